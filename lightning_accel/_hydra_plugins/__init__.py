"""Puts our presets on the search path of every Hydra app: `+accel=amp_prune` needs no import.

Installed as `hydra_plugins.lightning_accel`, where Hydra discovers it. The path is appended, so a
user's own `conf/accel/*.yaml` wins.
"""

import importlib.util
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningAccelSearchPath(SearchPathPlugin):
    """Append `lightning_accel/conf` of a wheel, or `conf/` of an editable install's checkout."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        spec = importlib.util.find_spec("lightning_accel")
        if spec is None or spec.origin is None:
            return
        package = Path(spec.origin).parent
        if (package / "conf").is_dir():
            search_path.append("lightning_accel", "pkg://lightning_accel.conf")
        elif (package.parent / "conf" / "accel").is_dir():
            search_path.append("lightning_accel", f"file://{package.parent / 'conf'}")
