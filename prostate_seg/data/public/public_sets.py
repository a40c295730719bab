"""Public prostate MRI data sets: addresses, files that are kept, licences and citations.

Checksums were published by MONAI (Task05_Prostate.tar) and torch-em (Zenodo archives). None is published of the PI-CAI masks,
whose archive GitHub makes on request: the checksum of the first download is recorded and compared with later ones.
"""

from dataclasses import dataclass

from prostate_seg.data.public.unpack import Rule

PICAI_RECORD = "https://zenodo.org/records/6624726/files"
PICAI_LABELS = "https://github.com/DIAGNijmegen/picai_labels/archive/refs/heads/main.zip"
PICAI_SHA256 = (
    "1c9683b436bedbe4384bb4a8133ebb4213349e5af2296ba62cd26fafa36366e0",
    "eb31d43a949e9245385cea5e66f4584197bbdb7df4ee99af6e47da980ddbb565",
    "5116355bc0cbf152122467405a0e9636c268e46a144f0f5de51abb48753e9d29",
    "070f172b5668e9a07900d9f07a48e0a313067e63280140ca0c43a6070487e765",
    "feabdbf8bb2d28c091dc41fcd66cbd4c2a898aaee05ca27401ccfc343ccec016",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """One file to download."""

    part: str | None
    """Name in fetch.parts; None for an archive that every part needs, which is the last."""
    name: str
    url: str
    checksum: str | None
    """Published checksum, such as sha256:1c96...; None if there is none."""
    rules: tuple[Rule, ...]
    is_for_training: bool = True
    """Whether it is fetched when fetch.parts is null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """A public data set."""

    title: str
    page: str
    licence: str
    cite: tuple[str, ...]
    masks_by: str
    """Author of the masks: column reference_by of cases.csv, by which results are compared."""
    archives: tuple[Archive, ...] = ()
    """Empty for a data set that is downloaded by hand."""

    @property
    def parts(self) -> list[str]:
        """Names that fetch.parts may contain."""
        return [archive.part for archive in self.archives if archive.part is not None]

    @property
    def training_parts(self) -> list[str]:
        """Parts that are fetched when fetch.parts is null."""
        return [archive.part for archive in self.archives if archive.part is not None and archive.is_for_training]


def _picai_fold(index: int) -> Archive:
    name = f"picai_public_images_fold{index}.zip"
    return Archive(
        part=f"fold{index}",
        name=name,
        url=f"{PICAI_RECORD}/{name}?download=1",
        checksum=f"sha256:{PICAI_SHA256[index]}",
        rules=(Rule(member=r"([0-9]+_[0-9]+)_t2w\.mha", target="images/{}.mha"),),
    )


def _prostate158(part: str, record: int, sha256: str) -> Archive:
    name = f"prostate158_{part}.zip"
    study = "(?:train|valid|test)/([0-9]+)"
    return Archive(
        part=part,
        name=name,
        url=f"https://zenodo.org/records/{record}/files/{name}?download=1",
        checksum=f"sha256:{sha256}",
        is_for_training=part != "test",
        rules=(
            Rule(member=rf"{study}/t2\.nii\.gz", target="images/p158{}.nii.gz"),
            Rule(member=rf"{study}/t2_anatomy_reader1\.nii\.gz", target="masks/p158{}.nii.gz"),
        ),
    )


PUBLIC_SETS = {
    "picai": PublicSet(
        title="PI-CAI: public training and development dataset, 1,500 studies of 1,476 patients, T2-weighted series only",
        page="https://pi-cai.grand-challenge.org/DATA/",
        licence="CC BY-NC 4.0, images and masks: https://creativecommons.org/licenses/by-nc/4.0/",
        cite=(
            "Saha A, Twilt JJ, Bosma JS, et al. The PI-CAI Challenge: Public Training and Development Dataset (v2.0). "
            "Zenodo, 2022. doi:10.5281/zenodo.6624726",
            "Saha A, Bosma JS, Twilt JJ, et al. Artificial intelligence and radiologists in prostate cancer detection on MRI "
            "(PI-CAI). Lancet Oncology 2024. doi:10.1016/S1470-2045(24)00220-1",
            "Masks: AI-derived delineations Bosma22b of https://github.com/DIAGNijmegen/picai_labels, by the algorithm "
            "https://github.com/DIAGNijmegen/AbdomenMRUS-prostate-segmentation",
        ),
        masks_by="AI model Bosma22b",
        archives=(
            *(_picai_fold(index) for index in range(5)),
            Archive(
                part=None,
                name="picai_labels.zip",
                url=PICAI_LABELS,
                checksum=None,
                rules=(
                    Rule(
                        member=r"anatomical_delineations/whole_gland/AI/Bosma22b/([0-9]+_[0-9]+)\.nii\.gz",
                        target="masks/{}.nii.gz",
                        with_image_only=True,
                    ),
                    Rule(
                        member=r"anatomical_delineations/whole_gland/human_expert/(?:[^/]+/)?([0-9]+_[0-9]+)\.nii\.gz",
                        target="masks_human/{}.nii.gz",
                        with_image_only=True,
                    ),
                    Rule(member=r"clinical_information/marksheet\.csv", target="marksheet.csv"),
                ),
            ),
        ),
    ),
    "decathlon": PublicSet(
        title="Medical Segmentation Decathlon, Task 5: 32 studies with masks of two zones; channel 0, T2, of two",
        page="http://medicaldecathlon.com",
        licence="CC BY-SA 4.0: https://creativecommons.org/licenses/by-sa/4.0/",
        cite=(
            "Antonelli M, Reinke A, Bakas S, et al. The Medical Segmentation Decathlon. Nature Communications 2022;13:4128. "
            "doi:10.1038/s41467-022-30695-9",
            "Simpson AL, Antonelli M, Bakas S, et al. A large annotated medical image dataset for the development and "
            "evaluation of segmentation algorithms. 2019. arXiv:1902.09063",
        ),
        masks_by="readers of the Decathlon",
        archives=(
            Archive(
                part="training",
                name="Task05_Prostate.tar",
                url="https://msd-for-monai.s3-us-west-2.amazonaws.com/Task05_Prostate.tar",
                checksum="md5:35138f08b1efaef89d7424d2bcc928db",
                rules=(
                    Rule(member=r"imagesTr/prostate_([0-9]+)\.nii\.gz", target="images/prostate-{}.nii.gz", channel=0),
                    Rule(member=r"labelsTr/prostate_([0-9]+)\.nii\.gz", target="masks/prostate-{}.nii.gz"),
                ),
            ),
        ),
    ),
    "prostate158": PublicSet(
        title="Prostate158: 139 studies for training and 19 for testing, masks of two zones by the first reader",
        page="https://github.com/kbressem/prostate158",
        licence="CC BY 4.0: https://creativecommons.org/licenses/by/4.0/",
        cite=(
            "Adams LC, Makowski MR, Engel G, et al. Prostate158 - An expert-annotated 3T MRI dataset and algorithm for "
            "prostate cancer detection. Computers in Biology and Medicine 2022;148:105817. "
            "doi:10.1016/j.compbiomed.2022.105817",
        ),
        masks_by="reader 1 of Prostate158",
        archives=(
            _prostate158("train", 6481141, "7a97b263be1bdbc79f6c8a3461e010b2cea9a266249af47671616dadff77da2e"),
            _prostate158("test", 6592345, "d64a7b94f0654de21150af9b7a5734b2921ec4793bc129b98803ef9ae9d459c4"),
        ),
    ),
    "promise12": PublicSet(
        title="PROMISE12: 50 studies of four centres with whole-gland masks",
        page="https://zenodo.org/records/8026660",
        licence="that of LICENSE.TXT of the Zenodo record: https://zenodo.org/records/8026660",
        cite=(
            "Litjens G, Toth R, van de Ven W, et al. Evaluation of prostate segmentation algorithms for MRI: the PROMISE12 "
            "challenge. Medical Image Analysis 2014;18(2):359-373. doi:10.1016/j.media.2013.12.002",
        ),
        masks_by="readers of PROMISE12",
    ),
}
"""Data sets by the value of `data=`."""
