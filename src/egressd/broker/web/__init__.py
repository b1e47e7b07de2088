"""EFFECTS: the broker over HTTP. Routes, bodies, problems and streams; decides nothing."""
