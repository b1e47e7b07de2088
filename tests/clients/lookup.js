// Prints what c-ares (dns.resolve*) says of a name: addresses, or the error's code.
const { promises: dns } = require("dns");
const name = process.argv[2];
Promise.allSettled([dns.resolve4(name), dns.resolve6(name)]).then((both) => {
  const found = both.flatMap((one) => (one.status === "fulfilled" ? one.value : []));
  console.log(found.length ? found.join("\n") : "error: " + both[0].reason.code);
  process.exitCode = found.length ? 0 : 1;
});
