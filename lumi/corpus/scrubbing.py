"""Personal details in a text -> fixed placeholders: e-mail addresses, IP addresses, phone numbers.

Rules find what has an unmistakable form, as those of datatrove (Penedo et al. 2024) do. They cannot find
names or street addresses. Of phone numbers they find those with a country code, and those of North America.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Detail = Literal["email", "ip", "phone"]
DETAILS: tuple[Detail, ...] = ("email", "ip", "phone")  # the digits of an IP address are no phone number
PLACEHOLDERS: dict[Detail, str] = {"email": "[EMAIL]", "ip": "[IP]", "phone": "[PHONE]"}

# ASCII, so that letters of scripts without spaces may stand beside them. No part matches in two ways. A first
# character that is no letter, with what may not precede it behind it, is found ten times as fast.
_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}(?![\w-])", re.ASCII | re.IGNORECASE
)
_IPV4 = re.compile(r"\d(?<![\w.].)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\d)", re.ASCII)
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{1,4}(?!\w|:[\w:]|\.\d)", re.ASCII | re.IGNORECASE
)
_INSIDE_IPV6 = re.compile(r":[0-9a-fA-F]{0,4}:")
_WITH_COUNTRY = re.compile(r"\+(?<![\w+].)[1-9](?:[ \u00a0()./-]{0,2}\d){7,14}(?!\d)", re.ASCII)  # as E.164
_NORTH_AMERICAN = re.compile(  # 1-212-555-0142, (212) 555-0142, 212.555.0142
    r"[(1-9](?<![\w.+-].)"
    r"(?:(?<=1)[ .-](?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])|(?<=\()[2-9]\d\d\) ?|(?<=[2-9])\d\d[.-])"
    r"[2-9]\d\d[.-]\d{4}(?![\w-]|\.\d)",
    re.ASCII,
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def scrub(text: str, details: Sequence[Detail], replaced: Counter[str]) -> str:
    """Replace details of these kinds, and add to `replaced` how many of each.

    IP addresses of private networks, of this machine and of documentation stay: they lead to nobody.
    """
    if "email" in details and "@" in text:
        text = _replace(_EMAIL, text, "email", replaced)
    if "ip" in details:
        text = _replace(_IPV4, text, "ip", replaced)
        if _INSIDE_IPV6.search(text):
            text = _replace(_IPV6, text, "ip", replaced)
    if "phone" in details:
        text = _replace(_WITH_COUNTRY, text, "phone", replaced)
        text = _replace(_NORTH_AMERICAN, text, "phone", replaced)
    return text


def _replace(pattern: re.Pattern[str], text: str, detail: Detail, replaced: Counter[str]) -> str:
    def placeholder(found: re.Match[str]) -> str:
        if detail == "ip" and not _is_public(found[0]):
            return found[0]
        replaced[detail] += 1
        return PLACEHOLDERS[detail]

    return pattern.sub(placeholder, text)


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False  # a version, a time, or a name in C++
    return address.is_global and (address.version == 4 or address in _GLOBAL_UNICAST)
