"""PURE: who may read what. Identities, roles and rights, access lists, barriers, and the one decision.

No clock, no store, no file: what is believed about an asker and about documents comes in as arguments, and
what comes out says which of the candidates may be shown. Everything that is not plainly permitted is denied.
"""
