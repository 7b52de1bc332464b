"""Store URLs as they may be shown: who reads a log or an error must not learn a password from it."""

from __future__ import annotations

from alora_serve.errors import ConfigError


def public_url(url: str) -> str:
    """The URL without user, password and options. Works on malformed ones too, hence no parser."""
    scheme, colon, rest = url.partition(":")
    if not colon:
        return url
    slashes = "//" if rest.startswith("//") else ""
    location, _, options = rest.removeprefix("//").partition("?")
    if "@" in options:  # of a password with a bare question mark, perhaps: nobody knows where it ends
        location = ""
    return f"{scheme}:{slashes}{location.rpartition('@')[2]}"


def url_error(url: str, problem: str) -> ConfigError:
    """The error that refuses ``url``."""
    return ConfigError(f"store_url {public_url(url)}: {problem}")
