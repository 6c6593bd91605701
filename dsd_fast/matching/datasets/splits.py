"""The official few-shot parts."""

from __future__ import annotations

from collections.abc import Sequence

from dsd_fast.matching.groups import Group

# The part of the data that the official code adapts to: 1 group of so many.
_ONE_OF = 20


def official_split(groups: Sequence[Group], format: str, part: str) -> list[Group]:
    """The groups that the official code trains on, or evaluates on (eric-ai-lab/DSD, custom_datasets.py).

    ============ ============================================= ====================================
    format       train                                         evaluation
    ============ ============================================= ====================================
    refcocog     the first 5 % of the groups                   the others
    comvg        the first 5 % of those of comvg_train.csv     all of compositional_visual_genome.csv
    vqa          the first 5 % of those of vqa_text_train.csv  all of vqa_text_test.csv
    vqa-binary   none                                          all
    winoground   none                                          all
    ============ ============================================= ====================================

    5 % of n groups are ⌊n / 20⌋. Of RefCOCOg's 95,010 groups, 950,100 pairs, that makes 4,750 groups, 47,500 pairs, and
    leaves 90,260. Of ComVG and VQA the two parts are files of their own: give the groups of the part's file.

    Args:
        groups: all groups of the file, in its order.
        format: a format of the table.
        part: "train" or "evaluation".

    Raises:
        ValueError: a format without an official split, an unknown part, a part that the format does not have, or too
            few groups for a training part.
    """
    if format not in ("refcocog", "comvg", "vqa", "vqa-binary", "winoground"):
        raise ValueError(
            f"format: got {format!r}, which has no official split; "
            "expected 'refcocog', 'comvg', 'vqa', 'vqa-binary' or 'winoground'"
        )
    if part not in ("train", "evaluation"):
        raise ValueError(f"part: got {part!r}, expected 'train' or 'evaluation'")
    if part == "train" and format in ("vqa-binary", "winoground"):
        raise ValueError(f"part: {format} has no training part, expected 'evaluation'")
    count = len(groups) // _ONE_OF
    if part == "train":
        if not count:
            raise ValueError(f"groups: got {len(groups)}, of which 5 % are none; expected {_ONE_OF} or more")
        return list(groups[:count])
    return list(groups[count:]) if format == "refcocog" else list(groups)
