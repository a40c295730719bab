"""Restores files and folders by their hash from DVC's cache, or from its remote if they are not in the cache."""

from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc_data.hashfile import load
from dvc_data.hashfile.checkout import CheckoutError, checkout
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from dvc_objects.fs.local import localfs

from prostate_seg.common.address import project_root
from prostate_seg.common.errors import InputError


def restore(md5: str, target: Path) -> None:
    """Write the file or folder of a hash to `target`.

    Raises:
        InputError: If there is no DVC project, or neither its cache nor its remote has the hash.
    """
    wanted = HashInfo("md5", md5)
    try:
        with Repo(str(project_root())) as repo:
            cache = repo.cache.local
            try:
                found = load(cache, wanted)
            except FileNotFoundError:
                repo.cloud.pull([wanted])
                found = load(cache, wanted)
            files = [entry for _, _, entry in found if entry] if isinstance(found, Tree) else [wanted]
            missing = [entry for entry in files if not cache.exists(str(entry.value))]
            if missing:
                repo.cloud.pull(missing)
            target.parent.mkdir(parents=True, exist_ok=True)
            checkout(str(target), localfs, found, cache, force=True, quiet=True)
    except (DvcException, CheckoutError, OSError) as error:
        raise InputError(
            f"{target.name} with md5 {md5} is neither here, nor in DVC's cache, nor in its remote: {error}\n"
            "Get it with dvc pull, or put the data back that the run read."
        ) from error
