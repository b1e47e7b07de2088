"""EFFECTS: whose token it is. Issuers as configured, their keys, and the verification of one ID token."""
