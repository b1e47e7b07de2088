"""EFFECTS: the request. Verify who asks, resolve the role, compute what may be read, project, run, destroy.

The service (`egressd-broker`) holds no privilege: it is one account among the members of a workspace. Its
main process speaks HTTP and never touches a document; a runner, forked for each request, projects the
documents into a directory that only it and its sandbox can see, runs the command, and is gone.
"""
