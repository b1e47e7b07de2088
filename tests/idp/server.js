// oidc-provider over TLS on the loopback, configured by one line of JSON on standard input:
//   {modules, port, certificate, key, jwks, clients, accounts}
// It says "ready PORT" when it listens, and ends when its input does, so that it outlives no test.

import { createRequire } from 'node:module';
import https from 'node:https';
import readline from 'node:readline';

const lines = readline.createInterface({ input: process.stdin });
lines.once('line', (line) => start(JSON.parse(line)));
lines.once('close', () => process.exit(0));

function start({ modules, port, certificate, key, jwks, clients, accounts }) {
  const { Provider } = createRequire(`${modules}/package.json`)('oidc-provider');
  const server = https.createServer({ cert: certificate, key });
  server.listen(port, '127.0.0.1', () => {
    const provider = new Provider(`https://127.0.0.1:${server.address().port}`, {
      jwks,
      clients,
      cookies: { keys: ['of tests alone'] },
      claims: { openid: ['sub'], email: ['email', 'email_verified'], groups: ['groups'], tenant: ['tid', 'oid', 'hd'] },
      scopes: ['openid', 'email', 'groups', 'tenant'],
      conformIdTokenClaims: false, // groups stand in the ID token itself
      enabledJWA: { idTokenSigningAlgValues: ['RS256', 'PS256', 'ES256', 'EdDSA', 'HS256'] },
      ttl: { IdToken: 600, AccessToken: 600, AuthorizationCode: 60, Interaction: 600, Session: 600, Grant: 600 },
      findAccount: (_, id) => accounts[id] && {
        accountId: id,
        claims: () => ({ sub: id, ...accounts[id] }),
      },
      features: {
        devInteractions: { enabled: true },
        // An access token that is a JWT of the same issuer, key, subject and audience as an ID token.
        resourceIndicators: {
          enabled: true,
          defaultResource: () => undefined,
          useGrantedResource: () => true,
          getResourceServerInfo: () => ({
            audience: 'egressd', scope: 'groups', accessTokenFormat: 'jwt', jwt: { sign: { alg: 'RS256' } },
          }),
        },
      },
    });
    server.on('request', provider.callback());
    console.log(`ready ${server.address().port}`);
  });
}
