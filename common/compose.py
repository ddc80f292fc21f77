"""Composing configs: the same result as Hydra's, but the slow parts once.

Hydra reads and merges the YAML files of the chosen groups (a tenth of a second), then applies `key=value` overrides in
order. A sweep has many jobs with few sets of groups, so the merged config is kept and only the values are applied anew;
and many sets with few files, so what was read of a file is kept, too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from common.config import to_config

SHARED = Path(__file__).parent / "conf"
PLAIN_OVERRIDE = re.compile(r"(?:\+\+?)?([\w./]+)=")  # Hydra's own parser takes milliseconds a piece


@functools.cache
def conf_dir(paper: str) -> Path:
    """Folder of a paper's YAML files.

    Raises:
        ValueError: when there is no such paper.
    """
    spec = importlib.util.find_spec(paper) if paper.isidentifier() else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        conf = Path(root).resolve() / "conf"
        if (conf / "config.yaml").is_file():
            _check_headers(conf)
            return conf
    raise ValueError(f"paper={paper}: must be a package with conf/config.yaml")


def _check_headers(conf: Path) -> None:
    """Hydra reads `# @package` only above all other comments, and silently ignores it further down."""
    for path in conf.rglob("*.yaml"):
        lines = path.read_text().splitlines()
        late = [n for n, line in enumerate(lines, 1) if line.startswith("# @package")]
        if late and late[0] > 1:
            raise ValueError(f"{path.relative_to(conf.parent)}:{late[0]}: '# @package' must be the file's first line")


@functools.lru_cache(maxsize=100_000)
def parse(override: str) -> Override:
    """Parse one override.

    Raises:
        hydra.errors.OverrideParseException: when it is not `key=value`.
    """
    return OverridesParser.create().parse_override(override)


def target(override: str) -> str:
    """The key or group that an override sets, without prefix and package."""
    plain = PLAIN_OVERRIDE.match(override)
    return plain.group(1) if plain else parse(override).key_or_group


def merge(*parts: Sequence[str]) -> list[str]:
    """Join override lists; of several overrides of one key the last one stays, in its place."""
    last = {target(o): o for part in parts for o in part}
    seen: list[str] = []
    for override in reversed([o for part in parts for o in part]):
        if last.get(target(override)) == override and override not in seen:
            seen.append(override)
    return seen[::-1]


@contextlib.contextmanager
def hydra_for(paper: str) -> Iterator[None]:
    """Set Hydra up for a paper's configs, also from within a Hydra job, whose own set-up comes back afterwards."""
    instance = GlobalHydra.instance()
    outer, instance.hydra = instance.hydra, None
    try:
        with hydra.initialize_config_dir(str(conf_dir(paper)), job_name=paper, version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


class _Repository(CachingConfigRepository):
    """Hydra's repository of one config, which takes from `kept` what another has read."""

    def __init__(self, own: CachingConfigRepository, kept: dict[str, Any]) -> None:
        self.delegate, self.cache, self.kept = own.delegate, own.cache, kept

    def load_config(self, config_path: str) -> Any:
        found = self.cache.get(config_path)
        if found is None:
            if config_path not in self.kept:
                self.kept[config_path] = self.delegate.load_config(config_path=config_path)
            found = copy.copy(self.kept[config_path])
            if found is not None:
                found.config = copy.deepcopy(found.config)  # parts of it become parts of the config
            self.cache[config_path] = found
        return found


class _Loader(ConfigLoaderImpl):
    """Hydra's loader, but a file is read once in its life and not once a config."""

    def __init__(self, other: ConfigLoader) -> None:
        super().__init__(other.get_search_path())
        self.kept: dict[str, Any] = {}

    def _parse_overrides_and_create_caching_repo(self, config_name: Any, overrides: Any) -> Any:
        parsed, repository = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        return parsed, _Repository(repository, self.kept)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: a config is made of thousands of objects, and each some hundred start one."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class Composer:
    """Configs of one paper; files that change in its life go unseen.

    Args:
        paper: package name.
        schema: dataclass of a trial.
    """

    def __init__(self, paper: str, schema: type) -> None:
        self.paper, self.schema, self.conf = paper, schema, conf_dir(paper)
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._loader: _Loader | None = None

    def full(self, overrides: Sequence[str]) -> DictConfig:
        """Compose with Hydra itself, the `hydra` node included."""
        with hydra_for(self.paper), _uncollected():
            own = GlobalHydra.instance().hydra
            assert own is not None
            self._loader = self._loader or _Loader(own.config_loader)
            own.config_loader = self._loader
            return hydra.compose("config", list(overrides), return_hydra_config=True)

    @_uncollected()
    def config(self, overrides: Sequence[str]) -> Any:
        """Compose and check one job's config.

        Raises:
            ValueError, hydra.errors.HydraException: as for a trial of its own.
        """
        groups = [o for o in overrides if self.is_group(o)]
        values = [parse(o) for o in overrides if not self.is_group(o)]
        if any(v.type is not OverrideType.CHANGE or v.package for v in values):
            return to_config(self.full(overrides), self.schema)
        base = self._bases.get(tuple(groups))
        if base is None:
            self._bases[tuple(groups)] = base = self.full(groups)
            with open_dict(base):
                del base["hydra"]
        config = copy.deepcopy(base)
        try:
            for value in values:
                OmegaConf.update(config, value.key_or_group, value.value(), merge=True)
        except OmegaConfBaseException:
            return to_config(self.full(overrides), self.schema)  # Hydra's own error names the override
        return to_config(config, self.schema)

    @functools.lru_cache(maxsize=100_000)  # noqa: B019
    def is_group(self, override: str) -> bool:
        """Whether an override chooses a group's option rather than set a value."""
        key = target(override)
        if isinstance(parse(override).value(), dict):
            return False
        return key.startswith("hydra/") or any((root / key).is_dir() for root in (self.conf, SHARED))

    def experiments(self) -> list[str]:
        """Names of the paper's experiments, sorted."""
        return sorted(path.stem for path in (self.conf / "experiment").glob("*.yaml"))
