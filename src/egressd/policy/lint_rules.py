"""The rules of `egressctl policy lint`: what each is called, what it says, how bad it usually is.

An id is for ever: pipelines name it to disable a rule, and code scanning knows a finding again by it.
`docs/lint.md` has a heading for each id; a test compares the two.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

__all__ = ["INVALID_POLICY", "PAGE", "RULES", "Level", "LintRule"]

PAGE: Final = "docs/lint.md"
INVALID_POLICY: Final = "invalid-policy"


class Level(enum.StrEnum):
    """In SARIF's words (section 3.27.10). A note never makes a run fail."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class LintRule:
    id: str
    level: Level  # unless a finding has reason to be something else; `help` says when
    title: str
    help: str

    @property
    def anchor(self) -> str:
        """Where the documentation explains it."""
        return f"{PAGE}#{self.id}"


_TABLE = (
    LintRule(
        INVALID_POLICY,
        Level.ERROR,
        "The file is refused",
        "egressd does not take this file; the last good policy of the workspace stays in force. Nothing"
        " else can be said about a file that is refused, so correct this first. The rule cannot be"
        " disabled.",
    ),
    LintRule(
        "region-mismatch",
        Level.ERROR,
        "The declared region is not the one of the URL",
        "A profile declares a region, and its base URL is of another one, or of a global endpoint. What"
        " counts is where requests go, which is what the URL says. Correct whichever is wrong.",
    ),
    LintRule(
        "jurisdiction-mismatch",
        Level.ERROR,
        "The region is not in the declared jurisdiction",
        "The region that a profile names lies in a country outside the jurisdiction that it declares:"
        " AWS eu-west-2 is London, eu-central-2 Zurich, and neither is in the EU. Jurisdictions are"
        " exact sets of countries; a name that begins with eu is none.",
    ),
    LintRule(
        "global-endpoint",
        Level.ERROR,
        "A global endpoint",
        "Nothing in the URL binds a request to a region: the provider processes it where it likes."
        " Under a pin the rule takes no part. Use a regional endpoint. Without a pin this is a note.",
    ),
    LintRule(
        "unplaced-endpoint",
        Level.ERROR,
        "The URL does not say where the endpoint is",
        "The name belongs to a known provider and does not tell the region, as those of Azure OpenAI do"
        " not. Under a pin the rule takes no part. List it as a provider whose residency: names region,"
        " jurisdiction and source. Without a pin this is a note.",
    ),
    LintRule(
        "unplaced-network",
        Level.ERROR,
        "No table places the whole network",
        "Under a pin every address of a cidr rule must lie in published prefixes inside the pin, or the"
        " rule says in writing who answers for it: vouch: REASON. That holds for private networks as"
        " well, which no table has.",
    ),
    LintRule(
        "outside-pin",
        Level.ERROR,
        "It is outside the pin",
        "The endpoint, or the network, is in a country that the pin does not name. The rule takes no"
        " part: its name is not resolved and nothing reaches it.",
    ),
    LintRule(
        "unverifiable-host",
        Level.WARNING,
        "The host is in no catalogue",
        "No known provider has such names, so a name is let through or refused by its addresses alone,"
        " when it is looked up. Whether they lie inside the pin cannot be known from the file. Of a"
        " provider's profile without a pin this is a note: nothing confirms what it declares.",
    ),
    LintRule(
        "cross-region-profile",
        Level.WARNING,
        "Requests are spread over several regions",
        "A model id such as eu.anthropic... or global.amazon... is a cross-region inference profile of"
        " Bedrock: the request is processed in any region of that group, whatever the region in the host"
        " name. Vertex AI does the same for locations/global, eu and us. An error if one of the regions"
        " is outside the pin, a note if all are inside.",
    ),
    LintRule(
        "sandbox-can-choose-model",
        Level.NOTE,
        "A sandbox can ask this endpoint for other regions",
        "The model id stands inside TLS, where the network does not see it: a sandbox can ask a Bedrock"
        " endpoint inside the pin for a cross-region inference profile, and its request is processed"
        " elsewhere. What can hold it is the account: an IAM or service control policy that denies"
        " bedrock:Invoke* by aws:RequestedRegion and bedrock:InferenceProfileArn.",
    ),
    LintRule(
        "missing-residency",
        Level.WARNING,
        "A profile without residency under a pin",
        "The workspace is pinned, and the profile does not say where its provider processes requests."
        " Add residency: with region, jurisdiction and source_url, so that it can be compared with the"
        " URL.",
    ),
    LintRule(
        "missing-source",
        Level.WARNING,
        "A declaration without a source",
        "A profile declares a region and does not say where the provider says so. Add source_url: the"
        " page of the provider's, or of the contract, that an auditor can look up.",
    ),
    LintRule(
        "vouched",
        Level.NOTE,
        "Somebody vouches for addresses that no table places",
        "With vouch: REASON the rule's addresses may be ones that no table of published prefixes can"
        " place, such as anycast. The reason is what stands in proofs. It never helps against a table"
        " that places an address outside.",
    ),
    LintRule(
        "wildcard-under-pin",
        Level.WARNING,
        "A wildcard under a pin",
        "Which names it covers shows only when they are asked for. Each is judged then, by its name and"
        " by its addresses; from the file nothing can be said.",
    ),
    LintRule(
        "open-guard",
        Level.WARNING,
        "The pin holds only what is listed",
        "The guard does not enforce, so whatever is not listed is reachable wherever it is. The pin"
        " still holds for the rules of the list, and for nothing else. Write guard: enforce.",
    ),
    LintRule(
        "no-tables",
        Level.WARNING,
        "There are no published prefixes to compare addresses with",
        "Under a pin an address is let through if it lies in a prefix published for a region inside."
        " Without any table every address is refused that nobody vouches for. Import them: egressctl"
        " residency import.",
    ),
    LintRule(
        "stale-table",
        Level.WARNING,
        "A table of prefixes is old",
        "Providers move prefixes between regions every week. The table is more than 30 days old; import"
        " a new one.",
    ),
    LintRule(
        "conflicting-table",
        Level.NOTE,
        "A table places addresses in two regions",
        "Within one table, a prefix lies in a wider one that is published for another region. The"
        " narrower one counts. Look whether the file is whole and what its publisher says.",
    ),
    LintRule(
        "unknown-region",
        Level.NOTE,
        "A table names a region that the catalogue does not place",
        "In which country the region is, nobody here knows, so addresses in it are refused under a pin."
        " Add the region to the catalogue with a file of your own in the residency directory.",
    ),
    LintRule(
        "broken-registry",
        Level.ERROR,
        "The catalogue or a table cannot be read",
        "A file of the residency directory is broken. Under a pin everything is refused then: half a"
        " table would place addresses wrongly.",
    ),
    LintRule(
        "secret-in-clear",
        Level.ERROR,
        "A secret stands in the file",
        "Policies are read by many, and shown in proofs. A key belongs elsewhere, and here stands a"
        " reference: secret://env/NAME or secret://file/PATH. A secret that was written here is known to"
        " whoever saw the file: replace it. What stands there is not repeated.",
    ),
    LintRule(
        "http-base-url",
        Level.WARNING,
        "The base URL is not encrypted",
        "Over http:// whoever is on the way reads requests, and the key with them. An error if the"
        " profile has an api_key. Endpoints of this machine are not meant.",
    ),
    LintRule(
        "unused-provider",
        Level.NOTE,
        "A profile that nothing uses",
        "The profile is in no route and in no rule under allow:. Remove it, or use it.",
    ),
    LintRule(
        "unreachable-provider",
        Level.WARNING,
        "A route names a provider that is not allowed",
        "The route can select this profile, and no rule under allow: lets a sandbox reach its endpoint."
        " Add - provider: NAME under allow:.",
    ),
    LintRule(
        "route-without-compliant-provider",
        Level.ERROR,
        "No provider of the route may be used",
        "Every profile of the route is outside the pin, or external routing is off. Asked for this"
        " route, egressd answers that there is none and records it: it blocks, and never falls back.",
    ),
)

RULES: Final = {rule.id: rule for rule in _TABLE}
