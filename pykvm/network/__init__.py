"""Networks on the host's side: TAPs, bridges, user-mode networks, and addresses in them.

A guest's network is described by a `NetworkSpecification`; a `Tap` or a `UserNetwork` is the other
side of its virtio device. Everything that is made here is gone after close(), and the TAPs of a
process that was killed are, too.
"""

from pykvm.network.addresses import (
    AddressesExhaustedError,
    DhcpServer,
    DnsmasqError,
    StaticAddress,
    allocate,
)
from pykvm.network.bridge import (
    DEFAULT_ADDRESS,
    DEFAULT_BRIDGE,
    BridgeAddressError,
    BridgePort,
    NotABridgeError,
)
from pykvm.network.frame_stream import FrameStream
from pykvm.network.links import (
    InterfaceNameError,
    NetworkBusyError,
    NetworkError,
    NetworkPrivilegeError,
)
from pykvm.network.mac_address import MacAddressError, mac_address, parse_mac
from pykvm.network.specification import (
    Forward,
    NetworkKind,
    NetworkSpecification,
    NetworkSpecificationError,
)
from pykvm.network.tap import Offload, Tap, TapExistsError, TunMissingError
from pykvm.network.user_network import PasstError, UserNetwork

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_BRIDGE",
    "AddressesExhaustedError",
    "BridgeAddressError",
    "BridgePort",
    "DhcpServer",
    "DnsmasqError",
    "Forward",
    "FrameStream",
    "InterfaceNameError",
    "MacAddressError",
    "NetworkBusyError",
    "NetworkError",
    "NetworkKind",
    "NetworkPrivilegeError",
    "NetworkSpecification",
    "NetworkSpecificationError",
    "NotABridgeError",
    "Offload",
    "PasstError",
    "StaticAddress",
    "Tap",
    "TapExistsError",
    "TunMissingError",
    "UserNetwork",
    "allocate",
    "mac_address",
    "parse_mac",
]
