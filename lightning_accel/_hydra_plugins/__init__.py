"""Puts our presets on the search path of every Hydra app: `+accel=amp_prune` needs no import.

Installed as `hydra_plugins.lightning_accel`, where Hydra discovers it. The path is appended, so a
user's own `conf/accel/*.yaml` wins. A preset may also be a file of the folder in which the command was
typed, such as the one that a tuner wrote: `+accel=./tuned.yaml`. Nothing of torch is imported here.
"""

import builtins
import copy
import importlib.util
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf

_GROUP = "accel/"
_SUFFIXES = (".yaml", ".yml")
_EXPLICIT = ("./", "../", "/")
_MOST_BYTES = 1_000_000


class LightningAccelSearchPath(SearchPathPlugin):
    """Append the group `accel`, from `lightning_accel/conf` of a wheel or `conf/` of a checkout."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        _look_before_merging()
        spec = importlib.util.find_spec("lightning_accel")
        if spec is None or spec.origin is None:
            return
        package = Path(spec.origin).parent
        if (package / "conf").is_dir():
            search_path.append("lightning_accel", f"{Travelling.scheme()}://{package / 'conf'}")
        elif (package.parent / "conf" / "accel").is_dir():
            found = package.parent / "conf"
            search_path.append("lightning_accel", f"{Travelling.scheme()}://{found}")


class Travelling(ConfigSource):
    """The group `accel` with its techniques below, and no other group of the folder.

    A name that an app may have given to a group of its own (`memory`, `precision`, `trainer`) would answer
    for a file that is missing there, and the app would run with our configuration; and a file of the
    app's would answer where a preset of ours asks for a technique.
    """

    @staticmethod
    def scheme() -> str:
        return "travelling"

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (
            _travels(config_path) and Path(self.path, config_path).is_dir()
        )

    def is_config(self, config_path: str) -> bool:
        return _travels(config_path) and self._file(config_path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        found = [
            path for path in Path(self.path, config_path).glob("*") if path.name[0] not in "._"
        ]
        if not config_path:
            found = [path for path in found if _travels(path.name)]
        groups = {p.name for p in found if p.is_dir() and results_filter != ObjectType.CONFIG}
        configs = {
            p.stem for p in found if p.suffix in _SUFFIXES and results_filter != ObjectType.GROUP
        }
        return sorted(groups | configs)

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._file(config_path)
        text = _text(path)
        return ConfigResult(
            config=_mapping(path, text),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=ConfigSource._get_header_dict(text),
        )

    def _file(self, config_path: str) -> Path:
        return Path(self.path, config_path.removesuffix(".yaml") + ".yaml")


class LightningAccelPresetFiles(SearchPathPlugin):
    """Look for `+accel=./tuned.yaml` in the present folder, before the app's own `conf/accel`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("accel files", f"{PresetFile.scheme()}://{Path.cwd()}", anchor="main")


class PresetFile(ConfigSource):
    """One yaml file named by its path, in the group `accel` and no other.

    A name that begins with `./`, `../` or `/` is always such a file, and an error where there is none.
    Another name is one when it ends in `.yaml` and the file is there; all else is left to the other
    sources. Relative paths start from the folder in which the command was typed.
    """

    @staticmethod
    def scheme() -> str:
        return "preset"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._file(config_path)
        if path is None:
            raise _refusal(f"`{config_path}` is no file of a preset", "another kind of name", "")
        text = _text(path)
        header = ConfigSource._get_header_dict(text)
        config = _mapping(path, text)
        if header["package"] is None:
            raise _refusal(
                f"`{path}` has no package, so all of it would land under `accel` without effect",
                f"{text.splitlines()[0][:80]!r} as its first line" if text else "an empty file",
                "make its first line `# @package _global_`",
            )
        return ConfigResult(
            config=config, path=f"file://{path.parent}", provider=self.provider, header=header
        )

    def _file(self, config_path: str) -> Path | None:
        name = config_path.removeprefix(_GROUP)
        if name == config_path:
            return None
        path = Path(self.path, name)
        if not name.startswith(_EXPLICIT):
            return path if path.suffix in _SUFFIXES and path.is_file() else None
        return path if path.suffix in _SUFFIXES else path.with_name(path.name + _SUFFIXES[0])


def register() -> None:
    """Make both plugins known to this process where Hydra did not find them: in a bare source tree."""
    from hydra.core.plugins import Plugins

    known = {found.__name__ for found in Plugins.instance().discover()}
    for ours in (PresetFile, Travelling, LightningAccelSearchPath, LightningAccelPresetFiles):
        if ours.__name__ not in known:
            Plugins.instance().register(ours)


def _look_before_merging() -> None:
    """Have it said when an app's `callbacks` cannot take in those of a preset.

    For a list OmegaConf says "Cannot merge DictConfig with ListConfig" without a key, and an interpolation
    would be replaced without a word, with all callbacks behind it (hydra#1939 recommends one). Hydra has no
    hook between loading and merging, hence this; where its method is gone, its own words are what is left.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    merge = getattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", None)
    if merge is None or hasattr(merge, "__wrapped__"):
        return

    @wraps(merge)
    def looked(self: Any, defaults: Any, repo: Any) -> DictConfig:
        ours = [_travels(default.config_path or "") for default in defaults]
        if any(ours):
            pairs = list(zip(defaults, ours, strict=True))
            mine = merge(self, [default for default, own in pairs if own], _reading_anew(repo))
            if "callbacks" in mine:
                theirs = [default for default, own in pairs if not own]
                _refuse_unnamed(merge(self, theirs, _reading_anew(repo)))
        merged: DictConfig = merge(self, defaults, repo)
        return merged

    ConfigLoaderImpl._compose_config_from_defaults_list = looked  # type: ignore[method-assign]


def _reading_anew(repo: Any) -> Any:
    """Return the same files without what is cached of them: merging writes into what was loaded."""
    again = copy.copy(repo)
    again.cache = {}
    return again


def _refuse_unnamed(app: DictConfig) -> None:
    node: Any = app._get_node("callbacks", validate_access=False)
    if isinstance(node, ListConfig) and not (node._is_none() or node._is_interpolation()):
        found = f"{len(node)} without names"
    elif node is not None and node._is_interpolation():
        found = f"the interpolation {node._value()}, which a preset would replace"
    else:
        return
    raise _refusal(
        "a preset adds callbacks by name, so `callbacks` of this app has to be a mapping",
        found,
        "write `callbacks: {early_stopping: {_target_: ...}, ...}`, and where the Trainer takes a list, "
        "give it `${oc.dict.values:callbacks}` in yaml, or in Python "
        "`list(hydra.utils.instantiate(cfg.callbacks).values())`",
    )


def _travels(config_path: str) -> bool:
    group, *names = config_path.split("/")
    return group == "accel" and ".." not in names


def _text(path: Path) -> str:
    if not path.is_file():
        raise _refusal(
            f"there is no preset `{path}`",
            "no such file" if not path.exists() else "something that is not a file",
            "check the path: it starts from the folder in which the command was typed",
        )
    if path.stat().st_size > _MOST_BYTES:
        found = f"{path.stat().st_size} bytes"
        raise _refusal(f"`{path}` is too large for a preset", found, "name a yaml file of settings")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(
            f"`{path}` cannot be read", str(error), "name a yaml file in UTF-8"
        ) from error


def _mapping(path: Path, text: str) -> DictConfig:
    try:
        config: Any = OmegaConf.create(text)
    except Exception as error:  # of yaml and of OmegaConf, which have no common parent
        raise _refusal(f"`{path}` is not valid yaml", str(error), "correct the file") from error
    if not isinstance(config, DictConfig):
        kind = type(config).__name__
        raise _refusal(f"`{path}` is no preset", f"a {kind}", "write a mapping of settings")
    return config


def _refusal(what: str, found: str, do: str) -> ConfigCompositionException:
    parts = [what, f"Found: {found}", f"Do: {do}" if do else ""]
    return ConfigCompositionException(" ".join(f"{part.rstrip('.')}." for part in parts if part))
