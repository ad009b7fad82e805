"""Numbers as people read them: as many digits as they are good for, and a true minus sign."""

from __future__ import annotations

import math
from typing import Any


def decimals(size: float, digits: int = 2) -> int:
    """Digits after the point that show `digits` significant ones of `size`; none for 0.

    >>> decimals(0.0423), decimals(31.0)
    (3, 0)
    """
    return max(0, digits - 1 - math.floor(math.log10(size))) if size else 0


def fixed(value: float, places: int, sign: bool = False) -> str:
    """`value` with `places` digits after the point.

    >>> fixed(-0.0004, 3), fixed(-0.21, 2, sign=True)
    ('0.000', '−0.21')
    """
    text = f"{value:.{places}f}"
    if not text.strip("-0."):
        return text.lstrip("-")
    return (f"+{text}" if sign and value > 0 else text).replace("-", "−")


def loss(mean: float, sd: float | None) -> str:
    """A loss with at most 4 digits after the point, and its deviation over seeds with two significant ones.

    >>> loss(4.65274, None), loss(4.65274, 0.0123)
    ('4.6527', '4.653 ± 0.012')
    """
    if sd is None:
        return fixed(mean, 4)
    places = min(4, decimals(sd)) if sd else 4
    return f"{fixed(mean, places)} ± {fixed(sd, places)}"


def difference(mean: float, low: float | None, high: float | None) -> str:
    """A difference, to two significant digits of its interval's half width; more where a bound would round to 0.

    >>> difference(-0.2132, -0.2553, -0.1711)
    '−0.213 [−0.255, −0.171]'
    """
    if low is None or high is None:
        return fixed(mean, 4, sign=True)
    places = decimals((high - low) / 2)
    while low * high > 0 and min(abs(low), abs(high)) < 0.5 * 10**-places:
        places += 1
    return f"{fixed(mean, places, sign=True)} [{fixed(low, places, sign=True)}, {fixed(high, places, sign=True)}]"


def size(count: float) -> str:
    """Bytes in MiB or GiB, three significant digits.

    >>> size(54_630_000), size(3 * 2**31), size(-700)
    ('52.1 MiB', '6.00 GiB', '0.00 MiB')
    """
    unit, name = (2**30, "GiB") if abs(count) >= 1000 * 2**20 else (2**20, "MiB")
    amount = count / unit
    return f"{fixed(amount, min(2, decimals(abs(amount), 3)) if amount else 2)} {name}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three significant digits.

    >>> milliseconds(0.0712), milliseconds(1.5)
    ('71.2 ms', '1500 ms')
    """
    return f"{fixed(1e3 * seconds, decimals(1e3 * seconds, 3))} ms"


def percent(share: float) -> str:
    """A spread in per cent.

    >>> percent(0.038), percent(0.002)
    ('4 %', '0.2 %')
    """
    return f"{fixed(100 * share, min(1, decimals(100 * share, 1)))} %"


def value(number: Any) -> str:
    """A tuned value.

    >>> value(0.0017782794), value(None), value("cosine")
    ('0.00178', '', 'cosine')
    """
    return f"{number:.3g}" if isinstance(number, int | float) else "" if number is None else str(number)


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "seed"), count(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
