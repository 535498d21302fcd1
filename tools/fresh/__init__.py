"""`make fresh`: run the README's commands on a minimal Debian with make and git.

A new root file system gets a clone of this checkout's HEAD. The commands run there as root, in
namespaces of their own. The system gets this machine's configuration for reaching package archives,
but no cache, no other environment variables and no packages.
"""
