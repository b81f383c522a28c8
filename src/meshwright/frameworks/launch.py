"""A launch as it was read: its settings, where each came from, and what could not be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from meshwright.describe.cluster import Cluster, build_cluster, load_cluster
from meshwright.errors import MeshwrightError
from meshwright.findings import Finding
from meshwright.frameworks.shell_words import Word
from meshwright.frameworks.words import job_of, layout_of, layout_word_names
from meshwright.parallel.layout import Layout

if TYPE_CHECKING:
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model

FRAMEWORKS: Final = ("megatron-lm", "megatron-bridge", "nemo", "skyrl", "verl", "torchtitan")
TITLES: Final = {
    "megatron-lm": "Megatron-LM",
    "megatron-bridge": "Megatron-Bridge",
    "nemo": "NeMo 2",
    "skyrl": "SkyRL",
    "verl": "verl",
    "torchtitan": "torchtitan",
    "meshwright": "A plan of meshwright",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A value in Megatron Core's words, and where it came from."""

    value: Any
    origin: str


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch of one framework.

    ``settings`` are in Megatron Core's words, whatever the framework. ``argv`` is what the
    framework itself is given: flags, or overrides ``path=value``. ``given`` are the words of the
    program's command line, variables of unknown value as they are written; a document
    has none. ``gpus`` is None where the launch does not say how many processes it starts.
    ``findings`` are those of the framework's own rules, in its order, silent changes among them
    as warnings.
    """

    framework: str
    settings: Mapping[str, Setting]
    argv: tuple[str, ...] = ()
    program: str = ""
    given: tuple[Word, ...] = ()
    gpus: int | None = None
    gpus_per_node: int | None = None
    gpu: str = ""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    findings: tuple[Finding, ...] = ()
    unread: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def words(self) -> dict[str, Any]:
        """Return the settings without their origins."""
        return {name: setting.value for name, setting in self.settings.items()}

    def layout(self, gpus: int | None = None) -> Layout[int]:
        """Return the layout on ``gpus``, or on as many as the launch starts.

        Raises ``LayoutError`` when the settings are no layout.
        """
        return layout_of(self.words, gpus or self.gpus)

    def job(self, x: Layout[int] | None = None) -> Job:
        """Return the job. Raises ``MeshwrightError`` when sequence or batch could not be read."""
        return job_of(self.words, x)

    def model(self) -> Model | None:
        """Return the model, or None when the launch neither names nor shapes a known one.

        Raises ``MeshwrightError`` when the shape cannot be.
        """
        from meshwright.frameworks.words_model import model_of

        return model_of(self.words)

    def cluster(self, stated: str | None = None) -> Cluster | None:
        """Return the cluster: as stated, or from the GPU that the launch asks Slurm for.

        Raises ``ClusterError`` when the stated one is unknown.
        """
        if stated is not None:
            return load_cluster(stated)
        if not self.gpu or self.gpus is None:
            return None
        try:
            return build_cluster(self.gpu, self.gpus, gpus_per_node=self.gpus_per_node)
        except MeshwrightError:
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "framework": self.framework,
            "gpus": self.gpus,
            "settings": {
                name: {"value": s.value, "origin": s.origin} for name, s in self.settings.items()
            },
            "env": dict(self.env),
            "unread": list(self.unread),
            "assumed": list(self.assumed),
        }


@dataclass(kw_only=True)
class Reading:
    """What a framework's reader made of its flags or overrides; the parts of a ``Launch``."""

    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    argv: list[str] = field(default_factory=list[str])
    gpus: int | None = None
    gpus_per_node: int | None = None
    findings: list[Finding] = field(default_factory=list[Finding])
    unread: list[str] = field(default_factory=list[str])
    assumed: list[str] = field(default_factory=list[str])

    def default(self, name: str, value: Any, framework: str) -> None:
        """Fill in a framework's default where the launch says nothing."""
        if name not in self.settings:
            self.settings[name] = Setting(value=value, origin=f"default of {framework}")


def layout_settings(launch: Launch) -> dict[str, Setting]:
    """Return the settings that make up the layout, in the order of ``layout_of``."""
    known = layout_word_names()
    return {name: launch.settings[name] for name in known if name in launch.settings}
