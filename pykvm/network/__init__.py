"""Networks on the host's side: TAPs, bridges, user-mode networks, and addresses in them.

A guest's network is described by a `NetworkSpecification`; a `Tap` or a `UserNetwork` is the other
side of its virtio device. Everything that is made here is gone after close(), and the TAPs of a
process that was killed are, too.

The modules are imported one by one: a machine without a network imports none.
"""
