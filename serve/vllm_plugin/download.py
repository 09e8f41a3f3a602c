"""Remote images: https, from allowed domains, from public addresses, in bounded size and time, without redirects."""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection

import httpx

from serve.media import Limits
from vlm.errors import UserError

SECONDS = 20.0
# IPv6 that leads to IPv4: "compatible" addresses (RFC 4291) and those of translators (RFC 6052)
TRANSLATED = (ipaddress.ip_network("::/96"), ipaddress.ip_network("64:ff9b::/96"))
Resolve = Callable[[str, int], Awaitable[list[str]]]


def check_url(url: str, domains: Collection[str]) -> None:
    """UserError unless it is an https URL of one of these domains, by its name."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        raise UserError("image_url: not a URL") from None
    plain = not (parts.userinfo or "\\" in url)
    if parts.scheme != "https" or parts.host not in domains or _is_address(parts.host) or not plain:
        takes = f"https images of {', '.join(domains)}" if domains else "images as data: URLs"
        raise UserError(f"image_url: this server takes {takes} only")


async def public_addresses(host: str, port: int) -> list[str]:
    """What the name stands for; UserError when any of it is not public."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise UserError(f"image_url: there is no {host}") from None
    addresses = [str(address[0]) for *_, address in found]
    if not all(_is_public(ipaddress.ip_address(address.partition("%")[0])) for address in addresses):
        raise UserError(f"image_url: {host} has an address that is not public")
    return addresses


async def download(url: str, resolve: Resolve = public_addresses, seconds: float = SECONDS) -> bytes:
    """The bytes behind a URL that `check_url` let pass. UserError for everything that goes wrong on the way.

    The name is resolved once, and the connection goes to what was checked: it can't change its mind in between.
    """
    asked = httpx.URL(url)
    try:
        async with asyncio.timeout(seconds):
            for address in await resolve(asked.host, asked.port or 443):
                try:
                    return await _get(asked, address)
                except httpx.ConnectError:
                    continue
    except TimeoutError:
        raise UserError(f"image_url: it did not arrive within {seconds:g} seconds") from None
    except httpx.HTTPError:
        raise UserError("image_url: its server broke off") from None
    raise UserError("image_url: its server can't be reached")


async def _get(asked: httpx.URL, address: str) -> bytes:
    headers = {"Host": asked.netloc.decode(), "Accept-Encoding": "identity"}
    certificate = {"sni_hostname": asked.host}  # it must be that of the name, not of the address
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
        client.stream("GET", asked.copy_with(host=address), headers=headers, extensions=certificate) as response,
    ):
        if response.status_code != 200:
            raise UserError(f"image_url: its server answered with status {response.status_code}")
        data = b""
        async for part in response.aiter_raw():
            data += part
            if len(data) > Limits.image_bytes:
                raise UserError(f"image_url: the image is over the limit of {Limits.image_bytes:,} bytes")
        return data


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Also not one that stands for a host of a network behind it, in an IPv6 address that leads to an IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.sixtofour or address.teredo or address.is_site_local or any(address in net for net in TRANSLATED):
            return False
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
    return address.is_global and not address.is_multicast


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
