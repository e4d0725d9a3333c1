"""What the folders of students and of indexes, which this project writes, have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.system.errors import InputError
from dse.system.files import check_ours, json_text, read_json, sha256_json, without_nan


@dataclass(frozen=True)
class FolderFormat:
    """A kind of folder. One of its files is a JSON object with the format, the version and its own SHA-256."""

    what: str  # for errors
    format: str
    version: int
    main: str  # the JSON file
    others: tuple[str, ...]  # all other names that its files may have
    mend: str  # how to get such a folder

    def check_place(self, folder: Path, role: str) -> None:
        """Raise InputError, naming the role, if a folder to be written is a file or holds other files."""
        check_ours(folder, role, self.main, self.format, {self.main, *self.others})

    def text(self, content: dict[str, Any], **options: Any) -> str:
        """The JSON file of some content; the options are those of json.dumps."""
        content = without_nan({"format": self.format, "version": self.version, **content})
        return json_text({**content, "sha256": sha256_json(content)}, **options) + "\n"

    def read(self, folder: Path) -> dict[str, Any]:
        """The JSON object. Raises InputError if it is missing, corrupt, another program's or of another version."""
        path = folder / self.main
        if not path.is_file():
            raise InputError(f"{folder}: holds no {self.what}: {self.main} is missing; {self.mend}")
        content = read_json(path, f"the description of the {self.what}")
        if content.get("format") != self.format:
            raise InputError(f"{folder}: holds no {self.what} of this project; {self.mend}")
        if (found := content.get("version")) != self.version:
            raise InputError(f"{folder}: its format is version {found}; this program reads {self.version}")
        if content.pop("sha256", None) != sha256_json(content):
            raise InputError(f"{path}: corrupt or changed (its hash differs); {self.mend}")
        return content
