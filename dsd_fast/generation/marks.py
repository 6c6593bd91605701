"""What an image says of itself: which model made it, from which seed, and that it is synthetic."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

# IPTC NewsCodes, digitalsourcetype: "The digital image was created algorithmically using a model derived from sampled
# content".
SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "urn:dsd-fast:xmp:1.0/"

# XML 1.0, section 2.2: all that is no Char.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def packet(model: str, seed: int | None) -> bytes:
    """Give the XMP packet (ISO 16684-1) of an image, in UTF-8.

    IPTC Photo Metadata 2025.1: Iptc4xmpExt:DigitalSourceType and Iptc4xmpExt:AISystemUsed; the seed, which no standard
    names, stands under :data:`NAMESPACE`.

    Args:
        model: its name; characters that XML forbids become U+FFFD.
        seed: of its noise; None where there is none to name.
    """
    name = escape(_FORBIDDEN.sub("\ufffd", model))
    number = "" if seed is None else f"<dsd:Seed>{seed}</dsd:Seed>"
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'xmlns:dsd="{NAMESPACE}">'
        f"<Iptc4xmpExt:DigitalSourceType>{SYNTHETIC}</Iptc4xmpExt:DigitalSourceType>"
        f"<Iptc4xmpExt:AISystemUsed>{name}</Iptc4xmpExt:AISystemUsed>{number}"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()
