"""Programs that run where the measuring happens: as another user, in the lab, in a sandbox."""
