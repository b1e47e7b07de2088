"""Endpoints with what has to be said of them, one to a line.

URL | scope | region | countries | what a pin to EU, to EEA and CH, and to US says (`Code`),
once where all three say the same

Written from the providers' documentation, not from the catalogue. "-" is nothing. Blocs stand for all of
their countries. A plain host rule is asked about: nothing is declared.
"""
# ruff: noqa: E501  (a URL is one word)

TABLE = """

# Amazon Bedrock, one endpoint for each region
https://bedrock-runtime.af-south-1.amazonaws.com | region | af-south-1 | ZA | outside
https://bedrock-runtime.ap-east-1.amazonaws.com | region | ap-east-1 | HK | outside
https://bedrock-runtime.ap-east-2.amazonaws.com | region | ap-east-2 | TW | outside
https://bedrock-runtime.ap-northeast-1.amazonaws.com | region | ap-northeast-1 | JP | outside
https://bedrock-runtime.ap-northeast-2.amazonaws.com | region | ap-northeast-2 | KR | outside
https://bedrock-runtime.ap-northeast-3.amazonaws.com | region | ap-northeast-3 | JP | outside
https://bedrock-runtime.ap-south-1.amazonaws.com | region | ap-south-1 | IN | outside
https://bedrock-runtime.ap-south-2.amazonaws.com | region | ap-south-2 | IN | outside
https://bedrock-runtime.ap-southeast-1.amazonaws.com | region | ap-southeast-1 | SG | outside
https://bedrock-runtime.ap-southeast-2.amazonaws.com | region | ap-southeast-2 | AU | outside
https://bedrock-runtime.ap-southeast-3.amazonaws.com | region | ap-southeast-3 | ID | outside
https://bedrock-runtime.ap-southeast-4.amazonaws.com | region | ap-southeast-4 | AU | outside
https://bedrock-runtime.ap-southeast-5.amazonaws.com | region | ap-southeast-5 | MY | outside
https://bedrock-runtime.ap-southeast-6.amazonaws.com | region | ap-southeast-6 | NZ | outside
https://bedrock-runtime.ap-southeast-7.amazonaws.com | region | ap-southeast-7 | TH | outside
https://bedrock-runtime.ca-central-1.amazonaws.com | region | ca-central-1 | CA | outside
https://bedrock-runtime.ca-west-1.amazonaws.com | region | ca-west-1 | CA | outside
https://bedrock-runtime.eu-central-1.amazonaws.com | region | eu-central-1 | DE | inside | inside | outside
https://bedrock-runtime.eu-central-2.amazonaws.com | region | eu-central-2 | CH | outside | inside | outside
https://bedrock-runtime.eu-north-1.amazonaws.com | region | eu-north-1 | SE | inside | inside | outside
https://bedrock-runtime.eu-south-1.amazonaws.com | region | eu-south-1 | IT | inside | inside | outside
https://bedrock-runtime.eu-south-2.amazonaws.com | region | eu-south-2 | ES | inside | inside | outside
https://bedrock-runtime.eu-west-1.amazonaws.com | region | eu-west-1 | IE | inside | inside | outside
https://bedrock-runtime.eu-west-2.amazonaws.com | region | eu-west-2 | UK | outside
https://bedrock-runtime.eu-west-3.amazonaws.com | region | eu-west-3 | FR | inside | inside | outside
https://bedrock-runtime.il-central-1.amazonaws.com | region | il-central-1 | IL | outside
https://bedrock-runtime.me-central-1.amazonaws.com | region | me-central-1 | AE | outside
https://bedrock-runtime.me-south-1.amazonaws.com | region | me-south-1 | BH | outside
https://bedrock-runtime.mx-central-1.amazonaws.com | region | mx-central-1 | MX | outside
https://bedrock-runtime.sa-east-1.amazonaws.com | region | sa-east-1 | BR | outside
https://bedrock-runtime.us-east-1.amazonaws.com | region | us-east-1 | US | outside | outside | inside
https://bedrock-runtime.us-east-2.amazonaws.com | region | us-east-2 | US | outside | outside | inside
https://bedrock-runtime.us-west-1.amazonaws.com | region | us-west-1 | US | outside | outside | inside
https://bedrock-runtime.us-west-2.amazonaws.com | region | us-west-2 | US | outside | outside | inside
https://bedrock-runtime.us-gov-east-1.amazonaws.com | region | us-gov-east-1 | US | outside | outside | inside
https://bedrock-runtime.us-gov-west-1.amazonaws.com | region | us-gov-west-1 | US | outside | outside | inside

# Amazon's other names, partitions, interface endpoints
https://bedrock-runtime-fips.us-east-1.amazonaws.com | region | us-east-1 | US | outside | outside | inside
https://bedrock-runtime-fips.ca-central-1.amazonaws.com | region | ca-central-1 | CA | outside
https://bedrock-runtime-fips.us-gov-west-1.amazonaws.com | region | us-gov-west-1 | US | outside | outside | inside
https://bedrock-runtime.eu-central-1.api.aws | region | eu-central-1 | DE | inside | inside | outside
https://bedrock-runtime.us-gov-east-1.api.aws | region | us-gov-east-1 | US | outside | outside | inside
https://bedrock-mantle.eu-west-1.api.aws/v1 | region | eu-west-1 | IE | inside | inside | outside
https://bedrock-mantle.eu-west-2.api.aws/v1 | region | eu-west-2 | UK | outside
https://bedrock-mantle.us-east-1.api.aws/v1 | region | us-east-1 | US | outside | outside | inside
https://bedrock.eu-north-1.amazonaws.com | region | eu-north-1 | SE | inside | inside | outside
https://bedrock-agent-runtime.eu-west-3.amazonaws.com | region | eu-west-3 | FR | inside | inside | outside
https://bedrock-agent-runtime.eu-central-2.amazonaws.com | region | eu-central-2 | CH | outside | inside | outside
https://bedrock-agent.ap-southeast-2.amazonaws.com | region | ap-southeast-2 | AU | outside
https://bedrock-agentcore.eu-central-1.amazonaws.com | region | eu-central-1 | DE | inside | inside | outside
https://bedrock-runtime.cn-north-1.amazonaws.com.cn | region | cn-north-1 | CN | outside
https://bedrock-runtime.cn-northwest-1.amazonaws.com.cn | region | cn-northwest-1 | CN | outside
https://bedrock-runtime.eusc-de-east-1.amazonaws.eu | region | eusc-de-east-1 | DE | inside | inside | outside
https://bedrock-runtime.eusc-de-east-1.api.amazonwebservices.eu | region | eusc-de-east-1 | DE | inside | inside | outside
https://vpce-0a1b2c3d4e5f67890-abcdefgh.bedrock-runtime.eu-central-1.vpce.amazonaws.com | region | eu-central-1 | DE | inside | inside | outside
https://vpce-0a1b2c3d4e5f67890-abcdefgh-us-east-1a.bedrock-runtime.us-east-1.vpce.amazonaws.com | region | us-east-1 | US | outside | outside | inside
https://runtime.sagemaker.eu-west-1.amazonaws.com/endpoints/llama/invocations | region | eu-west-1 | IE | inside | inside | outside
https://runtime.sagemaker.eu-west-2.amazonaws.com | region | eu-west-2 | UK | outside
https://runtime-fips.sagemaker.us-east-2.amazonaws.com | region | us-east-2 | US | outside | outside | inside
https://runtime.sagemaker.cn-north-1.amazonaws.com.cn | region | cn-north-1 | CN | outside
https://runtime.sagemaker.eusc-de-east-1.amazonaws.eu | region | eusc-de-east-1 | DE | inside | inside | outside
https://bedrock-runtime.eu-central-1.amazonaws.com/model/anthropic.claude-3-haiku-20240307-v1:0/converse | region | eu-central-1 | DE | inside | inside | outside
https://bedrock-runtime.eu-west-3.amazonaws.com/model/mistral.mistral-large-2402-v1%3A0/invoke | region | eu-west-3 | FR | inside | inside | outside
https://bedrock-runtime.us-east-1.amazonaws.com/model/meta.llama3-70b-instruct-v1:0/invoke | region | us-east-1 | US | outside | outside | inside
https://bedrock-runtime.eu-central-1.amazonaws.com/openai/v1 | region | eu-central-1 | DE | inside | inside | outside

# Amazon's names that cannot be placed
https://bedrock-runtime.eu-central-1.amazonaws.com/model/eu.anthropic.claude-sonnet-4-20250514-v1:0/converse | unplaced | - | - | unplaced
https://bedrock-runtime.eu-west-1.amazonaws.com/model/eu.meta.llama3-2-3b-instruct-v1:0/invoke | unplaced | - | - | unplaced
https://bedrock-runtime.us-east-1.amazonaws.com/model/us.amazon.nova-pro-v1:0/invoke | unplaced | - | - | unplaced
https://bedrock-runtime.us-east-1.amazonaws.com/model/global.anthropic.claude-sonnet-4-5-20250929-v1:0/converse | unplaced | - | - | unplaced
https://bedrock-runtime.ap-southeast-2.amazonaws.com/model/apac.anthropic.claude-3-5-sonnet-20240620-v1:0/converse | unplaced | - | - | unplaced
https://bedrock-runtime.us-gov-west-1.amazonaws.com/model/us-gov.anthropic.claude-3-haiku-20240307-v1:0/invoke | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.amazonaws.com/model/EU.anthropic.claude-3-haiku/converse | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.amazonaws.com/model/europe.anthropic.claude-3-haiku/converse | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.amazonaws.com/model/abcdef123456/converse | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.amazonaws.com/model/arn:aws:bedrock:eu-central-1:123456789012:inference-profile/eu.anthropic.x/converse | unplaced | - | - | unplaced
https://bedrock-runtime.cn-north-1.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.amazonaws.com.cn | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.amazonaws.eu | unplaced | - | - | unplaced
https://bedrock-runtime.eusc-de-east-1.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-9.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime.eu.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1a.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime.x.eu-central-1.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime-eu.eu-central-1.amazonaws.com | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.vpce.amazonaws.com | unplaced | - | - | unplaced
https://x.bedrock-runtime.eu-central-1.vpce.amazonaws.com | unplaced | - | - | unplaced
https://vpce-1.s3.eu-central-1.vpce.amazonaws.com | unplaced | - | - | unplaced
https://eu-central-1.bedrock-runtime.amazonaws.com | unplaced | - | - | unplaced
https://eu-central-1.amazonaws.com | unplaced | - | - | unplaced
https://s3.eu-central-1.amazonaws.com | unplaced | - | - | unplaced
https://bucket.s3.eu-central-1.amazonaws.com | unplaced | - | - | unplaced
https://abc123.execute-api.eu-central-1.amazonaws.com/prod | unplaced | - | - | unplaced
https://lambda-url.eu-central-1.on.amazonaws.com | unplaced | - | - | unplaced
https://amazonaws.com | unplaced | - | - | unplaced
https://api.aws | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.c2s.ic.gov | unplaced | - | - | unplaced
https://bedrock-runtime.eu-central-1.amazonaws.com:8443 | unplaced | - | - | unplaced
http://bedrock-runtime.eu-central-1.amazonaws.com | unplaced | - | - | unplaced
https://aws-external-anthropic.eu-central-1.api.aws/v1 | global | global | - | global-endpoint
https://aws-external-anthropic.us-west-2.api.aws/v1 | global | global | - | global-endpoint

# Google Vertex AI, one endpoint for each region
https://africa-south1-aiplatform.googleapis.com | region | africa-south1 | ZA | outside
https://asia-east1-aiplatform.googleapis.com | region | asia-east1 | TW | outside
https://asia-east2-aiplatform.googleapis.com | region | asia-east2 | HK | outside
https://asia-northeast1-aiplatform.googleapis.com | region | asia-northeast1 | JP | outside
https://asia-northeast2-aiplatform.googleapis.com | region | asia-northeast2 | JP | outside
https://asia-northeast3-aiplatform.googleapis.com | region | asia-northeast3 | KR | outside
https://asia-south1-aiplatform.googleapis.com | region | asia-south1 | IN | outside
https://asia-south2-aiplatform.googleapis.com | region | asia-south2 | IN | outside
https://asia-southeast1-aiplatform.googleapis.com | region | asia-southeast1 | SG | outside
https://asia-southeast2-aiplatform.googleapis.com | region | asia-southeast2 | ID | outside
https://australia-southeast1-aiplatform.googleapis.com | region | australia-southeast1 | AU | outside
https://australia-southeast2-aiplatform.googleapis.com | region | australia-southeast2 | AU | outside
https://europe-central2-aiplatform.googleapis.com | region | europe-central2 | PL | inside | inside | outside
https://europe-north1-aiplatform.googleapis.com | region | europe-north1 | FI | inside | inside | outside
https://europe-north2-aiplatform.googleapis.com | region | europe-north2 | SE | inside | inside | outside
https://europe-southwest1-aiplatform.googleapis.com | region | europe-southwest1 | ES | inside | inside | outside
https://europe-west1-aiplatform.googleapis.com | region | europe-west1 | BE | inside | inside | outside
https://europe-west2-aiplatform.googleapis.com | region | europe-west2 | UK | outside
https://europe-west3-aiplatform.googleapis.com | region | europe-west3 | DE | inside | inside | outside
https://europe-west4-aiplatform.googleapis.com | region | europe-west4 | NL | inside | inside | outside
https://europe-west6-aiplatform.googleapis.com | region | europe-west6 | CH | outside | inside | outside
https://europe-west8-aiplatform.googleapis.com | region | europe-west8 | IT | inside | inside | outside
https://europe-west9-aiplatform.googleapis.com | region | europe-west9 | FR | inside | inside | outside
https://europe-west10-aiplatform.googleapis.com | region | europe-west10 | DE | inside | inside | outside
https://europe-west12-aiplatform.googleapis.com | region | europe-west12 | IT | inside | inside | outside
https://me-central1-aiplatform.googleapis.com | region | me-central1 | QA | outside
https://me-central2-aiplatform.googleapis.com | region | me-central2 | SA | outside
https://me-west1-aiplatform.googleapis.com | region | me-west1 | IL | outside
https://northamerica-northeast1-aiplatform.googleapis.com | region | northamerica-northeast1 | CA | outside
https://northamerica-northeast2-aiplatform.googleapis.com | region | northamerica-northeast2 | CA | outside
https://northamerica-south1-aiplatform.googleapis.com | region | northamerica-south1 | MX | outside
https://southamerica-east1-aiplatform.googleapis.com | region | southamerica-east1 | BR | outside
https://southamerica-west1-aiplatform.googleapis.com | region | southamerica-west1 | CL | outside
https://us-central1-aiplatform.googleapis.com | region | us-central1 | US | outside | outside | inside
https://us-east1-aiplatform.googleapis.com | region | us-east1 | US | outside | outside | inside
https://us-east4-aiplatform.googleapis.com | region | us-east4 | US | outside | outside | inside
https://us-east5-aiplatform.googleapis.com | region | us-east5 | US | outside | outside | inside
https://us-south1-aiplatform.googleapis.com | region | us-south1 | US | outside | outside | inside
https://us-west1-aiplatform.googleapis.com | region | us-west1 | US | outside | outside | inside
https://us-west2-aiplatform.googleapis.com | region | us-west2 | US | outside | outside | inside
https://us-west3-aiplatform.googleapis.com | region | us-west3 | US | outside | outside | inside
https://us-west4-aiplatform.googleapis.com | region | us-west4 | US | outside | outside | inside

# Google's other names; the host and the path have to agree
https://europe-west4-aiplatform.googleapis.com/v1/projects/acme/locations/europe-west4/publishers/google | region | europe-west4 | NL | inside | inside | outside
https://europe-west1-aiplatform.googleapis.com/v1beta1/projects/acme/locations/europe-west1/endpoints/openapi | region | europe-west1 | BE | inside | inside | outside
https://us-east5-aiplatform.googleapis.com/v1/projects/acme/locations/us-east5/publishers/anthropic/models | region | us-east5 | US | outside | outside | inside
https://aiplatform.europe-west3.rep.googleapis.com | unplaced | - | - | unplaced
https://europe-west9-aiplatform-restricted.p.googleapis.com | region | europe-west9 | FR | inside | inside | outside
https://aiplatform.eu.rep.googleapis.com | multi-region | eu | EU | inside | inside | outside
https://aiplatform.eu.rep.googleapis.com/v1/projects/acme/locations/eu/publishers/google | multi-region | eu | EU | inside | inside | outside
https://aiplatform.us.rep.googleapis.com/v1/projects/acme/locations/us | multi-region | us | US | outside | outside | inside
https://aiplatform.googleapis.com | global | global | - | global-endpoint
https://aiplatform.googleapis.com/v1/projects/acme/locations/global/publishers/google | global | global | - | global-endpoint
https://generativelanguage.googleapis.com/v1beta | global | global | - | global-endpoint
https://generativelanguage.googleapis.com/v1beta/openai | global | global | - | global-endpoint
https://europe-west4-aiplatform.googleapis.com/v1/projects/acme/locations/us-central1/publishers/google | unplaced | - | - | unplaced
https://europe-west4-aiplatform.googleapis.com/v1/projects/acme/locations/global/publishers/google | unplaced | - | - | unplaced
https://europe-west4-aiplatform.googleapis.com/v1/projects/acme/locations/eu/publishers/google | unplaced | - | - | unplaced
https://us-central1-aiplatform.googleapis.com/v1/projects/acme/locations/europe-west4 | unplaced | - | - | unplaced
https://europe-west4-aiplatform.googleapis.com/v1/projects/acme/locations/EUROPE-WEST4 | unplaced | - | - | unplaced
https://europe-west4-aiplatform.googleapis.com/locations/europe-west4/locations/us-central1 | unplaced | - | - | unplaced
https://aiplatform.googleapis.com/v1/projects/acme/locations/europe-west4/publishers/google | unplaced | - | - | unplaced
https://aiplatform.googleapis.com/v1/projects/acme/locations/eu/publishers/google | unplaced | - | - | unplaced
https://aiplatform.eu.rep.googleapis.com/v1/projects/acme/locations/global | unplaced | - | - | unplaced
https://aiplatform.eu.rep.googleapis.com/v1/projects/acme/locations/us | unplaced | - | - | unplaced
https://eu-aiplatform.googleapis.com | unplaced | - | - | unplaced
https://us-aiplatform.googleapis.com | unplaced | - | - | unplaced
https://global-aiplatform.googleapis.com | unplaced | - | - | unplaced
https://europe-west5-aiplatform.googleapis.com | unplaced | - | - | unplaced
https://europe-west4.aiplatform.googleapis.com | unplaced | - | - | unplaced
https://europe-west4-aiplatform.eu.googleapis.com | unplaced | - | - | unplaced
https://x.europe-west4-aiplatform.googleapis.com | unplaced | - | - | unplaced
https://storage.googleapis.com | unplaced | - | - | unplaced
https://eu-discoveryengine.googleapis.com | unplaced | - | - | unplaced
https://europe-west4-aiplatform.googleapis.com:8443 | unplaced | - | - | unplaced

# Azure OpenAI, one endpoint for each region
https://australiacentral.api.cognitive.microsoft.com | region | australiacentral | AU | outside
https://australiaeast.api.cognitive.microsoft.com | region | australiaeast | AU | outside
https://australiasoutheast.api.cognitive.microsoft.com | region | australiasoutheast | AU | outside
https://austriaeast.api.cognitive.microsoft.com | region | austriaeast | AT | inside | inside | outside
https://belgiumcentral.api.cognitive.microsoft.com | region | belgiumcentral | BE | inside | inside | outside
https://brazilsouth.api.cognitive.microsoft.com | region | brazilsouth | BR | outside
https://brazilsoutheast.api.cognitive.microsoft.com | region | brazilsoutheast | BR | outside
https://canadacentral.api.cognitive.microsoft.com | region | canadacentral | CA | outside
https://canadaeast.api.cognitive.microsoft.com | region | canadaeast | CA | outside
https://centralindia.api.cognitive.microsoft.com | region | centralindia | IN | outside
https://centralus.api.cognitive.microsoft.com | region | centralus | US | outside | outside | inside
https://chilecentral.api.cognitive.microsoft.com | region | chilecentral | CL | outside
https://denmarkeast.api.cognitive.microsoft.com | region | denmarkeast | DK | inside | inside | outside
https://eastasia.api.cognitive.microsoft.com | region | eastasia | HK | outside
https://eastus.api.cognitive.microsoft.com | region | eastus | US | outside | outside | inside
https://eastus2.api.cognitive.microsoft.com | region | eastus2 | US | outside | outside | inside
https://francecentral.api.cognitive.microsoft.com | region | francecentral | FR | inside | inside | outside
https://francesouth.api.cognitive.microsoft.com | region | francesouth | FR | inside | inside | outside
https://germanynorth.api.cognitive.microsoft.com | region | germanynorth | DE | inside | inside | outside
https://germanywestcentral.api.cognitive.microsoft.com | region | germanywestcentral | DE | inside | inside | outside
https://indonesiacentral.api.cognitive.microsoft.com | region | indonesiacentral | ID | outside
https://israelcentral.api.cognitive.microsoft.com | region | israelcentral | IL | outside
https://italynorth.api.cognitive.microsoft.com | region | italynorth | IT | inside | inside | outside
https://japaneast.api.cognitive.microsoft.com | region | japaneast | JP | outside
https://japanwest.api.cognitive.microsoft.com | region | japanwest | JP | outside
https://koreacentral.api.cognitive.microsoft.com | region | koreacentral | KR | outside
https://malaysiawest.api.cognitive.microsoft.com | region | malaysiawest | MY | outside
https://mexicocentral.api.cognitive.microsoft.com | region | mexicocentral | MX | outside
https://newzealandnorth.api.cognitive.microsoft.com | region | newzealandnorth | NZ | outside
https://northcentralus.api.cognitive.microsoft.com | region | northcentralus | US | outside | outside | inside
https://northeurope.api.cognitive.microsoft.com | region | northeurope | IE | inside | inside | outside
https://norwayeast.api.cognitive.microsoft.com | region | norwayeast | NO | outside | inside | outside
https://norwaywest.api.cognitive.microsoft.com | region | norwaywest | NO | outside | inside | outside
https://polandcentral.api.cognitive.microsoft.com | region | polandcentral | PL | inside | inside | outside
https://qatarcentral.api.cognitive.microsoft.com | region | qatarcentral | QA | outside
https://southafricanorth.api.cognitive.microsoft.com | region | southafricanorth | ZA | outside
https://southcentralus.api.cognitive.microsoft.com | region | southcentralus | US | outside | outside | inside
https://southeastasia.api.cognitive.microsoft.com | region | southeastasia | SG | outside
https://southindia.api.cognitive.microsoft.com | region | southindia | IN | outside
https://spaincentral.api.cognitive.microsoft.com | region | spaincentral | ES | inside | inside | outside
https://swedencentral.api.cognitive.microsoft.com | region | swedencentral | SE | inside | inside | outside
https://swedensouth.api.cognitive.microsoft.com | region | swedensouth | SE | inside | inside | outside
https://switzerlandnorth.api.cognitive.microsoft.com | region | switzerlandnorth | CH | outside | inside | outside
https://switzerlandwest.api.cognitive.microsoft.com | region | switzerlandwest | CH | outside | inside | outside
https://uaenorth.api.cognitive.microsoft.com | region | uaenorth | AE | outside
https://uknorth.api.cognitive.microsoft.com | region | uknorth | UK | outside
https://uksouth.api.cognitive.microsoft.com | region | uksouth | UK | outside
https://ukwest.api.cognitive.microsoft.com | region | ukwest | UK | outside
https://westcentralus.api.cognitive.microsoft.com | region | westcentralus | US | outside | outside | inside
https://westeurope.api.cognitive.microsoft.com | region | westeurope | NL | inside | inside | outside
https://westus.api.cognitive.microsoft.com | region | westus | US | outside | outside | inside
https://westus2.api.cognitive.microsoft.com | region | westus2 | US | outside | outside | inside
https://westus3.api.cognitive.microsoft.com | region | westus3 | US | outside | outside | inside

# Azure's other names, and its other clouds
https://mistral-large.swedencentral.models.ai.azure.com/v1 | region | swedencentral | SE | inside | inside | outside
https://phi-4.eastus2.models.ai.azure.com | region | eastus2 | US | outside | outside | inside
https://llama.norwayeast.models.ai.azure.com | region | norwayeast | NO | outside | inside | outside
https://llama.switzerlandnorth.models.ai.azure.com | region | switzerlandnorth | CH | outside | inside | outside
https://scorer.westeurope.inference.ml.azure.com/score | region | westeurope | NL | inside | inside | outside
https://usgovvirginia.api.cognitive.microsoft.us | region | usgovvirginia | US | outside | outside | inside
https://usgovarizona.api.cognitive.microsoft.us | region | usgovarizona | US | outside | outside | inside
https://chinaeast2.api.cognitive.azure.cn | region | chinaeast2 | CN | outside
https://acme.openai.azure.com | unplaced | - | - | unplaced
https://acme.openai.azure.com/openai/v1 | unplaced | - | - | unplaced
https://acme.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21 | unplaced | - | - | unplaced
https://eu.openai.azure.com | unplaced | - | - | unplaced
https://westeurope.openai.azure.com | unplaced | - | - | unplaced
https://francecentral.openai.azure.com | unplaced | - | - | unplaced
https://acme-westeurope.openai.azure.com | unplaced | - | - | unplaced
https://acme.cognitiveservices.azure.com | unplaced | - | - | unplaced
https://acme.services.ai.azure.com/models | unplaced | - | - | unplaced
https://acme.services.ai.azure.com/api/projects/eu | unplaced | - | - | unplaced
https://acme.inference.ai.azure.com | unplaced | - | - | unplaced
https://acme.openai.azure.us | unplaced | - | - | unplaced
https://acme.openai.azure.cn | unplaced | - | - | unplaced
https://acme.cognitiveservices.azure.us | unplaced | - | - | unplaced
https://openai.azure.com | unplaced | - | - | unplaced
https://a.b.openai.azure.com | unplaced | - | - | unplaced
https://westeurope.acme.openai.azure.com | unplaced | - | - | unplaced
https://acme.westeurope.openai.azure.com | unplaced | - | - | unplaced
https://usgovvirginia.api.cognitive.microsoft.com | unplaced | - | - | unplaced
https://westeurope.api.cognitive.microsoft.us | unplaced | - | - | unplaced
https://chinaeast2.api.cognitive.microsoft.com | unplaced | - | - | unplaced
https://eu.api.cognitive.microsoft.com | unplaced | - | - | unplaced
https://api.cognitive.microsoft.com | unplaced | - | - | unplaced
https://germanywc.api.cognitive.microsoft.com | unplaced | - | - | unplaced
https://x.westeurope.api.cognitive.microsoft.com | unplaced | - | - | unplaced
https://contoso.models.ai.azure.com | unplaced | - | - | unplaced
https://llama.europe.models.ai.azure.com | unplaced | - | - | unplaced
https://westeurope.llama.models.ai.azure.com | unplaced | - | - | unplaced
https://management.azure.com | unplaced | - | - | unplaced
https://westeurope.management.azure.com | unplaced | - | - | unplaced
https://acme.openai.azure.com:444 | unplaced | - | - | unplaced
https://westeurope.api.cognitive.microsoft.com:8443 | unplaced | - | - | unplaced

# OpenAI
https://eu.api.openai.com/v1 | multi-region | eu | CH, EEA | outside | inside | outside
https://us.api.openai.com/v1 | region | us | US | outside | outside | inside
https://au.api.openai.com/v1 | region | au | AU | outside
https://jp.api.openai.com/v1 | region | jp | JP | outside
https://in.api.openai.com/v1 | region | in | IN | outside
https://api.openai.com/v1 | global | global | - | global-endpoint
https://api.openai.com | global | global | - | global-endpoint
https://ae.api.openai.com/v1 | unplaced | - | - | unplaced
https://ca.api.openai.com/v1 | unplaced | - | - | unplaced
https://gb.api.openai.com/v1 | unplaced | - | - | unplaced
https://sg.api.openai.com/v1 | unplaced | - | - | unplaced
https://kr.api.openai.com/v1 | unplaced | - | - | unplaced
https://de.api.openai.com/v1 | unplaced | - | - | unplaced
https://eu-api.openai.com | unplaced | - | - | unplaced
https://api.eu.openai.com | unplaced | - | - | unplaced
https://eu.openai.com | unplaced | - | - | unplaced
https://eu.eu.api.openai.com | unplaced | - | - | unplaced
https://x.eu.api.openai.com | unplaced | - | - | unplaced
https://openai.com | unplaced | - | - | unplaced
https://eu.api.openai.com:8443/v1 | unplaced | - | - | unplaced
http://eu.api.openai.com/v1 | unplaced | - | - | unplaced
https://xn--u-itb.api.openai.com | unplaced | - | - | unplaced

# Others that a region or a group of regions can be read from
https://api.eu.mistral.ai/v1 | multi-region | eu | CH, EEA | outside | inside | outside
https://eu.openrouter.ai/api/v1 | multi-region | eu | EU | inside | inside | outside
https://us.openrouter.ai/api/v1 | multi-region | us | US | outside | outside | inside
https://us.api.x.ai/v1 | region | us | US | outside | outside | inside
https://us-east-1.api.x.ai/v1 | region | us-east-1 | US | outside | outside | inside
https://api.scaleway.ai/v1 | region | fr-par | FR | inside | inside | outside
https://9921ae86-3cf5-4e5c-8151-e1d274ceb539.ifr.fr-par.scaleway.com/v1 | region | fr-par | FR | inside | inside | outside
https://9921ae86-3cf5-4e5c-8151-e1d274ceb539.ifr.nl-ams.scaleway.com/v1 | region | nl-ams | NL | inside | inside | outside
https://openai.inference.de-txl.ionos.com/v1 | region | de-txl | DE | inside | inside | outside
https://inference.de-txl.ionos.com | region | de-txl | DE | inside | inside | outside
https://api.openai-compat.model-serving.eu01.onstackit.cloud/v1 | region | eu01 | DE | inside | inside | outside
https://api.openai-compat.model-serving.eu02.onstackit.cloud/v1 | region | eu02 | AT | inside | inside | outside
https://xyz.eu-west-1.aws.endpoints.huggingface.cloud | region | eu-west-1 | IE | inside | inside | outside
https://w8qtunpthvh1r7a0.us-east-1.aws.endpoints.huggingface.cloud/v1/ | region | us-east-1 | US | outside | outside | inside
https://xyz.us-east4.gcp.endpoints.huggingface.cloud | region | us-east4 | US | outside | outside | inside
https://xyz.europe-west4.gcp.endpoints.huggingface.cloud | region | europe-west4 | NL | inside | inside | outside
https://xyz.eastus.azure.endpoints.huggingface.cloud | region | eastus | US | outside | outside | inside

# Global endpoints
https://api.mistral.ai/v1 | global | global | - | global-endpoint
https://codestral.mistral.ai/v1 | global | global | - | global-endpoint
https://api.anthropic.com | global | global | - | global-endpoint
https://api.anthropic.com/v1 | global | global | - | global-endpoint
https://api.cohere.com/v2 | global | global | - | global-endpoint
https://api.cohere.ai/v1 | global | global | - | global-endpoint
https://openrouter.ai/api/v1 | global | global | - | global-endpoint
https://router.huggingface.co/v1 | global | global | - | global-endpoint
https://api-inference.huggingface.co/models/gpt2 | global | global | - | global-endpoint
https://api.deepseek.com | global | global | - | global-endpoint
https://api.groq.com/openai/v1 | global | global | - | global-endpoint
https://api.together.xyz/v1 | global | global | - | global-endpoint
https://api.fireworks.ai/inference/v1 | global | global | - | global-endpoint
https://api.x.ai/v1 | global | global | - | global-endpoint
https://api.perplexity.ai | global | global | - | global-endpoint
https://api.tokenfactory.nebius.com/v1 | global | global | - | global-endpoint
https://api.studio.nebius.ai/v1 | global | global | - | global-endpoint
https://ollama.com/api | global | global | - | global-endpoint

# A provider's, and not to be placed
https://eu-west-1.api.x.ai/v1 | unplaced | - | - | unplaced
https://eu.api.x.ai/v1 | unplaced | - | - | unplaced
https://eu.mistral.ai | unplaced | - | - | unplaced
https://eu.api.mistral.ai | unplaced | - | - | unplaced
https://api.us.mistral.ai | unplaced | - | - | unplaced
https://chat.mistral.ai | unplaced | - | - | unplaced
https://eu.anthropic.com | unplaced | - | - | unplaced
https://eu.api.anthropic.com | unplaced | - | - | unplaced
https://api.eu.cohere.com | unplaced | - | - | unplaced
https://eu.api.openrouter.ai | unplaced | - | - | unplaced
https://huggingface.co | unplaced | - | - | unplaced
https://eu.huggingface.co | unplaced | - | - | unplaced
https://xyz.eu-west-1.gcp.endpoints.huggingface.cloud | unplaced | - | - | unplaced
https://xyz.europe-west4.aws.endpoints.huggingface.cloud | unplaced | - | - | unplaced
https://xyz.eu-west-1.endpoints.huggingface.cloud | unplaced | - | - | unplaced
https://oai.endpoints.kepler.ai.cloud.ovh.net/v1 | unplaced | - | - | unplaced
https://bge.endpoints.kepler.ai.cloud.ovh.net | unplaced | - | - | unplaced
https://api.eu.scaleway.ai | unplaced | - | - | unplaced
https://abc.ifr.eu.scaleway.com | unplaced | - | - | unplaced
https://s3.fr-par.scw.cloud | unplaced | - | - | unplaced
https://openai.inference.de-fra.ionos.com | unplaced | - | - | unplaced
https://api.aleph-alpha.com | unplaced | - | - | unplaced
https://llm-server.llmhub.t-systems.net/v2 | unplaced | - | - | unplaced
https://api.tokenfactory.us-central1.nebius.com/v1 | unplaced | - | - | unplaced
https://api.openai-compat.model-serving.eu03.onstackit.cloud | unplaced | - | - | unplaced
https://eu.groq.com | unplaced | - | - | unplaced
https://eu.api.deepseek.com | unplaced | - | - | unplaced
https://eu.ollama.com | unplaced | - | - | unplaced

# Look-alikes: nobody's whom the catalogue knows, so that the addresses will decide
https://eu-west-1.evil.com | unknown | - | - | by-address
https://eu.evil.com | unknown | - | - | by-address
https://bedrock-runtime.eu-central-1.amazonaws.com.evil.io | unknown | - | - | by-address
https://eu.api.openai.com.evil.io | unknown | - | - | by-address
https://api.openai.com.evil.io | unknown | - | - | by-address
https://eu.api.openai.com-evil.io | unknown | - | - | by-address
https://eu-api-openai.com | unknown | - | - | by-address
https://eu.api.0penai.com | unknown | - | - | by-address
https://eu.api.open-ai.com | unknown | - | - | by-address
https://eu.api.openai.co | unknown | - | - | by-address
https://eu.api.openai.org | unknown | - | - | by-address
https://notopenai.com | unknown | - | - | by-address
https://eu.api.notopenai.com | unknown | - | - | by-address
https://xn--penai-iye.com | unknown | - | - | by-address
https://eu.api.xn--openi-6qa.com | unknown | - | - | by-address
https://bedrock-runtime.eu-central-1.amazonaws.co | unknown | - | - | by-address
https://bedrock-runtime.eu-central-1.amazonaws.com.eu | unknown | - | - | by-address
https://bedrock-runtime.eu-central-1.xamazonaws.com | unknown | - | - | by-address
https://bedrock-runtime.eu-central-1-amazonaws.com | unknown | - | - | by-address
https://bedrock-runtime-eu-central-1.amazonaws.com.de | unknown | - | - | by-address
https://bedrock-runtime.eu-central-1.evil-amazonaws.com | unknown | - | - | by-address
https://europe-west4-aiplatform.googleapis.com.evil.io | unknown | - | - | by-address
https://europe-west4-aiplatform.googleapis.co | unknown | - | - | by-address
https://europe-west4-aiplatform-googleapis.com | unknown | - | - | by-address
https://acme.openai.azure.com.evil.io | unknown | - | - | by-address
https://acme.openai.azure.co | unknown | - | - | by-address
https://westeurope.api.cognitive.microsoft.com.evil.io | unknown | - | - | by-address
https://westeurope.api.cognitive-microsoft.com | unknown | - | - | by-address
https://westeurope.api.cognitive.micros0ft.com | unknown | - | - | by-address
https://eu.example.com | unknown | - | - | by-address
https://europe.example.eu | unknown | - | - | by-address
https://api.eu | unknown | - | - | by-address
https://frankfurt.de | unknown | - | - | by-address
https://llm.example.com | unknown | - | - | by-address
https://10.0.0.1:8000 | unknown | - | - | by-address
https://192.0.2.1 | unknown | - | - | by-address
https://[2001:db8::1]:8443 | unknown | - | - | by-address
https://203.0.113.9:11434 | unknown | - | - | by-address
https://llm | unknown | - | - | by-address
https://localhost.evil.io | unknown | - | - | by-address
https://x.localhost | unknown | - | - | by-address

# This machine
http://localhost:11434 | loopback | - | - | loopback
http://localhost:8000/v1 | loopback | - | - | loopback
http://127.0.0.1:11434/v1 | loopback | - | - | loopback
http://127.8.9.10:11434 | loopback | - | - | loopback
http://[::1]:11434 | loopback | - | - | loopback
https://LOCALHOST.:8443 | loopback | - | - | loopback

# The same in other letters
https://EU.API.OPENAI.COM/v1 | multi-region | eu | CH, EEA | outside | inside | outside
HTTPS://eu.api.openai.com./v1/ | multi-region | eu | CH, EEA | outside | inside | outside
https://eu.api.openai.com:443/v1 | multi-region | eu | CH, EEA | outside | inside | outside
https://Bedrock-Runtime.EU-Central-1.AmazonAWS.com. | region | eu-central-1 | DE | inside | inside | outside
https://bedrock-runtime.eu-central-1.amazonaws.com:443/ | region | eu-central-1 | DE | inside | inside | outside
https://Europe-West2-AIPlatform.googleapis.com. | region | europe-west2 | UK | outside
https://API.MISTRAL.AI./v1 | global | global | - | global-endpoint
https://Acme.OpenAI.Azure.com./openai | unplaced | - | - | unplaced
"""
