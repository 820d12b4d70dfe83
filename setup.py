"""Puts `configs/` into the wheel as `nsa_transformer/configs`. Everything else is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """An editable install reads `configs/` where it lies; a wheel has no checkout beside it, so it carries a copy."""

    def _configs(self) -> dict[str, str]:
        target = Path(self.build_lib) / "nsa_transformer" / "configs"
        return {str(target / source.relative_to("configs")): str(source) for source in sorted(Path("configs").rglob("*.yaml"))}

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for target, source in self._configs().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self._configs()]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._configs().values()]


setup(cmdclass={"build_py": BuildWithConfigs})
