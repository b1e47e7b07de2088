"""The catalogue that comes with egressd, read once for all tests."""

from __future__ import annotations

from pathlib import Path

import egressd.residency
from egressd.residency.catalogue import Catalogue
from egressd.residency.registry import Registry

_DATA = Path(egressd.residency.__file__).parent / "data"
FILES = tuple((path.name, path.read_bytes()) for path in sorted(_DATA.glob("*.yaml")))
CATALOGUE = Catalogue.load(FILES)
REGISTRY = Registry(catalogue=CATALOGUE)
