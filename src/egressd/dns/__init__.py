"""DNS without I/O: what is read, what is known, what is answered. Sockets and clocks are the resolver's.

wire       bytes <-> values; the one place that imports dnslib
replies    what can be answered, as values
sift       which real addresses may be used at all
slots      which synthetic address leads to which real one
schedule   when a name is looked up again
keeper     every listed name: what is known, what the kernel has acknowledged, what to do next
table      one workspace's view: query in, reply (or wait, or forward) out
exchange   one question to the upstream servers, over several attempts
tally      floods of equal events, counted instead of repeated
"""
