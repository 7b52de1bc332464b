from __future__ import annotations

import pytest

from alora_serve.cli.connection import connected
from alora_serve.errors import InvalidRequestError


@pytest.mark.parametrize("address", ["router", "router:", ":5", "router:http"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not host:port"), connected(address):
        pass
