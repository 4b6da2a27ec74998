"""Files of calibrated bases: safetensors with the provenance beside the directions."""

from __future__ import annotations

from pathlib import Path

from tinylora_lite.adapter.basis import Basis
from tinylora_lite.files.file_format import AdapterFileError, read_safetensors, write_safetensors

FORMAT = "tinylora-basis-1"
SHIPPED_BASES = Path(__file__).parents[1] / "nano" / "directions"
"""The calibrated bases that come with the package."""


def save_basis(basis: Basis, path: str | Path) -> Path:
    """Writes a basis as safetensors with its provenance, and returns the path.

    The file appears whole or not at all, and equal bases give equal bytes. Raises ``TypeError`` where the provenance
    holds something that JSON cannot.
    """
    header = {
        "format": FORMAT,
        "names": basis.names,
        "sigma": basis.sigma,
        "provenance": basis.provenance,
        "fingerprint": basis.fingerprint(),
    }
    return write_safetensors(path, header, {"directions": basis.directions.contiguous().cpu()})


def load_basis(path: str | Path) -> Basis:
    """Reads what :func:`save_basis` wrote, in this version of the library or an earlier one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no basis, or has an entry that this version does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no basis file at {path}; tl.calibrate and tl.save_basis make one")
    try:
        header, tensors = read_safetensors(path, FORMAT)
        settings = {name: header[name] for name in ("sigma", "provenance") if name in header}
        basis = Basis(tensors["directions"], tuple(header["names"]), **settings)
        if basis.fingerprint() != header["fingerprint"]:
            raise ValueError("its directions are not those that were saved")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no basis file ({error}); make it again with tl.calibrate") from error
    if unknown := sorted(header.keys() - {"format", "names", "sigma", "provenance", "fingerprint"}):
        raise ValueError(f"{path} sets {', '.join(unknown)}, unknown to this version of tinylora_lite; upgrade it")
    return basis


def find_basis(wanted: str, given: Basis | str | Path | None, path: Path) -> Basis:
    """The calibrated basis with the fingerprint ``wanted``, for the adapter file at ``path``.

    It is ``given``, or lies in that file or folder; ``None`` looks as :func:`~tinylora_lite.load` says. Raises
    ``AdapterFileError`` where it is not there.
    """
    if isinstance(given, Basis):
        if given.fingerprint() == wanted:
            return given
        raise AdapterFileError(f"{path} needs the basis {wanted[:12]}…; the one given is {given.fingerprint()[:12]}…")
    searched = "beside it and in the package" if given is None else f"at {given}"
    places = [path.parent, SHIPPED_BASES] if given is None else [Path(given)]
    for file in [file for at in places for file in (sorted(at.glob("*.safetensors")) if at.is_dir() else [at])]:
        try:
            basis = load_basis(file)
        except (FileNotFoundError, ValueError) as error:
            if places == [file]:
                raise AdapterFileError(f"{path} needs a calibrated basis: {error}") from error
            continue
        if basis.fingerprint() == wanted:
            return basis
    missing = f"{path} needs the calibrated basis {wanted[:12]}…, not found {searched}"
    raise AdapterFileError(f"{missing}; pass it as basis= or --basis")
