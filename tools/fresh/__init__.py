"""`make fresh`: run the README's commands on a Debian that has nothing but make and git.

A root file system is made new, with a clone of this checkout's HEAD in it; the commands run there
as root, in namespaces of their own. What this machine needs to reach the archives of packages is
carried in, and nothing else: no cache, no environment, no package.
"""
