"""SAPIEN's shaders without the table that takes a software renderer half a minute to fill.

Before its first picture SAPIEN integrates the environment reflectance of rough surfaces into a 128 x 128 lookup table.
SwiftShader needs 23 s of CPU time for that, in every process. A copy of the shaders evaluates Karis' closed-form fit of
the same table instead ("Physically Based Shading on Mobile", 2014), so the first picture takes about a second.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

PACKS = ("minimal", "default")
"""The shader packs that ManiSkill's cameras use."""

TABLE = re.compile(r"^.*uniform sampler2D samplerBRDFLUT;.*\n?", re.MULTILINE)
LOOKUP = "texture(samplerBRDFLUT, vec2(roughness, dotNV)).xy"
FIT = (
    "vec2(-1.04, 1.04) * (min((1.0 - roughness) * (1.0 - roughness), exp2(-9.28 * dotNV)) * (1.0 - roughness)"
    " + 0.0425 - 0.0275 * roughness) + vec2(1.04 - 0.572 * roughness, 0.022 * roughness - 0.04)"
)


def fast_shaders(original: Path, version: str) -> Path:
    """Return a folder of shaders like `original` (SAPIEN's, of `version`) that need no reflectance table.

    The copy is made once and kept in the user's cache folder.
    """
    digest = hashlib.sha256((TABLE.pattern + LOOKUP + FIT).encode()).hexdigest()[:8]
    target = _cache_folder() / f"sapien-{version}-shaders-{digest}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    shutil.copytree(original, scratch, dirs_exist_ok=True)
    for path in (path for pack in PACKS for path in (scratch / pack).iterdir()):
        text = path.read_text()
        if "samplerBRDFLUT" in text:
            path.write_text(TABLE.sub("", text).replace(LOOKUP, FIT))
    try:
        scratch.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(scratch)
    return target


def _cache_folder() -> Path:
    wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robopolicy"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if os.access(wanted, os.W_OK):
            return wanted
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"robopolicy-{os.getuid()}"
