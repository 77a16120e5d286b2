"""Puts our presets on the search path of every Hydra app: `+accel=amp_prune` needs no import.

Installed as `hydra_plugins.lightning_accel`, where Hydra discovers it. The path is appended, so a
user's own `conf/accel/*.yaml` wins. A preset may also be a file of the folder in which the command was
typed, such as the one that a tuner wrote: `+accel=./tuned.yaml`. Nothing of torch is imported here.
"""

import builtins
import copy
import importlib.util
import warnings
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

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
        header = _header(path, text)
        config = _mapping(path, text)
        if header["package"] is None:
            raise _refusal(
                f"`{path}` has no package, so all of it would land under `accel` without effect",
                f"{text.splitlines()[0][:80]!r} as its first line" if text else "an empty file",
                "make its first line `# @package _global_`",
            )
        _check(str(path), config, header["package"])
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
    def looked(self: Any, defaults: Any, repo: Any) -> Any:
        ours = [_travels(default.config_path or "") for default in defaults]
        if any(ours):
            pairs = list(zip(defaults, ours, strict=True))
            for default in (default for default, own in pairs if own):
                _check_loaded(default, repo)
            mine = merge(self, [default for default, own in pairs if own], _reading_anew(repo))
            if "callbacks" in mine or "trainer" in mine:
                theirs = [default for default, own in pairs if not own]
                app = merge(self, theirs, _reading_anew(repo))
                if "callbacks" in mine:
                    _refuse_unnamed(app)
                    _refuse_meddling(mine, app)
                merged = merge(self, defaults, repo)
                for line in _rules().settle(merged, mine, app):
                    warnings.warn(line, stacklevel=2)
                return merged
        return merge(self, defaults, repo)

    ConfigLoaderImpl._compose_config_from_defaults_list = looked  # type: ignore[method-assign]


def _check_loaded(default: Any, repo: Any) -> None:
    """Check a preset of the app's own folder as a file is checked; ours pass, and are as cheap to check."""
    found = _reading_anew(repo).load_config(default.config_path)
    if found is None or not isinstance(found.config, DictConfig):
        return
    listed = [_as_written(item) for item in found.defaults_list or () if not item.is_self()]
    plain = OmegaConf.to_container(found.config, resolve=False)
    package = default.package or ""
    lands = package.partition(".")[0]
    if lands == "accel":
        return  # a group of that name which is the app's own business lands there by default
    if lands or _rules().speaks_of_us(plain, listed):
        _check(f"{found.path}: {default.config_path}", found.config, package, listed)


def _as_written(default: Any) -> Any:
    """Return an item of a list of defaults as it stands in the file."""
    package = f"@{default.package}" if default.package else ""
    path = getattr(default, "path", None)
    if path is not None:
        return f"{path}{package}"
    how = "override " if default.override else ""
    return {f"{how}{default.group}{package}": default.value}


def _check(name: str, config: DictConfig, package: str, defaults: Any = None) -> None:
    """Refuse a preset that says more than a preset may, before anything of it is merged or resolved."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    listed = plain.pop("defaults", []) if defaults is None else defaults
    try:
        _rules().check_preset(plain, "" if package == "_global_" else package, listed)
    except ValueError as error:
        raise ConfigCompositionException(f"`{name}` is no preset of settings: {error}") from None


def _rules() -> Any:
    from lightning_accel import presets

    return presets


def _refuse_meddling(presets: DictConfig, app: DictConfig) -> None:
    """Refuse presets that change arguments of a callback which is the app's own."""
    node_of = _rules().node_of
    theirs = app._get_node("callbacks", validate_access=False)
    mine = presets._get_node("callbacks", validate_access=False)
    for name in map(str, mine.keys() if isinstance(mine, DictConfig) else ()):
        own = node_of(theirs, name)
        node = node_of(mine, name)
        found: Any = node_of(own, "_target_")
        target = found._value() if found is not None else None
        changed = not isinstance(node, DictConfig) or "_target_" not in node
        if changed and isinstance(target, str) and not target.startswith("lightning_accel."):
            raise _refusal(
                f"a preset changes `callbacks.{name}`, which is not a callback of lightning_accel",
                target,
                "change it on the command line, or in the app's own configuration",
            )


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
    try:
        missing = None if path.is_file() else "no such file"
        missing = missing and ("something that is not a file" if path.exists() else missing)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        missing = str(error.strerror)
    if missing:
        raise _refusal(
            f"there is no preset `{path}`",
            missing,
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


def _header(path: Path, text: str) -> dict[str, str | None]:
    try:
        return ConfigSource._get_header_dict(text)
    except ValueError as error:
        raise _refusal(
            f"the first lines of `{path}` are wrong", str(error), "correct them"
        ) from None


def _mapping(path: Path, text: str) -> DictConfig:
    try:
        loaded = yaml.load(text, Loader=get_yaml_loader())
        _rules().count(loaded)  # before OmegaConf writes out each alias of an alias
        config: Any = OmegaConf.create(loaded if loaded is not None else {})
    except Exception as error:  # of yaml and of OmegaConf, which have no common parent
        raise _refusal(f"`{path}` is not valid yaml", _told(error), "correct the file") from None
    if not isinstance(config, DictConfig):
        kind = type(config).__name__
        raise _refusal(f"`{path}` is no preset", f"a {kind}", "write a mapping of settings")
    return config


def _told(error: Exception) -> str:
    """Return what is wrong and where, without the lines of a file that may hold anything."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    problem = str(getattr(error, "problem", None) or type(error).__name__)
    return f"{problem}, line {mark.line + 1}"


def _refusal(what: str, found: str, do: str) -> ConfigCompositionException:
    parts = [what, f"Found: {found}", f"Do: {do}" if do else ""]
    return ConfigCompositionException(" ".join(f"{part.rstrip('.')}." for part in parts if part))
