"""Everything between sockets and the domain: servers, channels, errors on the wire, and the protobuf translator."""
