"""Where a site's units come from, and the door built around them (architecture.md §1).

Nothing here is read before the door has charged for it: a source is two promises, one to name who pays, from
identifiers alone, and one to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsecure.config import DatasetConfig
from fedsecure.data.dataset import Dataset, paths_of
from fedsecure.data.loading import open_dataset
from fedsecure.errors import DataError, PrivacyError
from fedsecure.learning.encoding import pace
from fedsecure.learning.features import check_declared, check_patients, load_units
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Population
from fedsecure.privacy.ledger import Ledger, Reservation
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.privacy.payers import Names, Payers, payers
from fedsecure.release import Door, Source
from fedsecure.site.line import Moment, Progress
from fedsecure.site.membership import Membership, check_budget, training_section


@dataclass(slots=True)
class Sources:
    """Opens a site's data sets, and keeps what it has read of them for the next question."""

    member: Membership
    ledger: Ledger
    rng: PrivacyRng
    progress: Progress
    _loaded: dict[Population, tuple[Dataset | None, UnitFeatures]] = field(default_factory=dict)
    _hashes: dict[Population, tuple[Dataset | None, Payers]] = field(default_factory=dict)
    _seen: dict[Population, frozenset[str]] = field(default_factory=dict)
    _affordable: bool = False

    def door(
        self,
        dataset: Dataset | None,
        evaluation: Dataset | None,
        *,
        told: Callable[[Sequence[Reservation]], None] = lambda made: None,
    ) -> Door:
        """The door of one question, over the data sets given or, by default, those of the site's file.

        Raises:
            PrivacyError: FS-1228 a data set given is not the one that the site's file declares.
            DataError: FS-1126 its classes are not the run's.
        """
        member = self.member
        config, entry = member.config, member.entry
        given: dict[Population, Dataset | None] = {"train": dataset, "evaluation": evaluation}
        configured: dict[Population, DatasetConfig | None] = {
            "train": config.train if entry.role == "train" else None,
            "evaluation": config.evaluation if entry.evaluation_units > 0 else None,
        }
        sources: dict[Population, Source] = {}
        for population, section in configured.items():
            if section is not None:
                public = population == "evaluation" and member.evaluation_public
                self._check_given(section, given[population], public=public)
                sources[population] = Source(
                    section.name,
                    public,
                    self._loader(population, section, given[population]),
                    self._hasher(population, section, given[population]),
                )
        if "train" in sources and not self._affordable:
            self._check_run(sources["train"], given=dataset is not None)
        return Door(
            config=config,
            settings=member.settings,
            features=member.features,
            ledger=self.ledger,
            sources=sources,
            rng=self.rng,
            device=config.device,
            run=member.run,
            told=told,
        )

    def _check_run(self, train: Source, *, given: bool) -> None:
        """Before the first charge of a run: all its rounds fit what these very units have left, under any name.

        Where records come from the caller and not from the site's file, that is known with the first of them only.
        """
        member = self.member
        if not given and not training_section(member.config).path.exists():
            return
        assert train.hashes is not None
        check_budget(
            member.settings,
            member.plan,
            config=member.config,
            ledger=self.ledger,
            run=member.run,
            units=train.hashes(),
        )
        self._affordable = True

    def _open(self, section: DatasetConfig, given: Dataset | None) -> Dataset:
        return given if given is not None else open_dataset(section, classes=self.member.settings.classes)

    def _check_given(self, section: DatasetConfig, given: Dataset | None, *, public: bool) -> None:
        """A data set handed in must be the one the site's file declares: it is charged, or not, as that one."""
        if given is None:
            return
        if given.name != section.name or (public and not given.public):
            raise PrivacyError(
                "FS-1228",
                f"data set {given.name!r}, public: {given.public}, in place of {section.name!r}, public: {public}",
                expected="the name under which the site's file charges it, and the same declaration",
                cure="give the data set the name of its section, and declare it public only if it is",
            )
        classes = self.member.settings.classes
        if tuple(given.classes) != classes:
            raise DataError(
                "FS-1126",
                f"data set {given.name!r} with classes {list(given.classes)[:10]}",
                expected=f"{list(classes)[:10]}, in this order",
                cure="build the data set with the run's classes",
            )

    def _hasher(self, population: Population, section: DatasetConfig, given: Dataset | None) -> Callable[[], Payers]:
        """Who pays: every patient of the data set, and every record by its place and its file."""

        def hashes() -> Payers:
            earlier = self._hashes.get(population)
            if earlier is None or earlier[0] is not given:
                records = self._open(section, given)
                records.index()
                # Before anything is charged: reading would refuse it as well, and too late.
                check_patients(records, self.member.settings.privacy.unit)
                self._check_count(population, records)
                names = _names(records, place=_place(section), given=given is not None)
                unit = self.member.settings.privacy.unit
                earlier = self._hashes[population] = given, payers(names, population, unit=unit, key=self.ledger.key)
            return earlier[1]

        return hashes

    def _loader(
        self, population: Population, section: DatasetConfig, given: Dataset | None
    ) -> Callable[[], UnitFeatures]:
        member = self.member
        privacy = member.settings.privacy

        def read() -> UnitFeatures:
            earlier = self._loaded.get(population)
            if earlier is None or earlier[0] is not given:
                self.progress(Moment(f"reading and encoding {section.name}"))
                records = self._open(section, given)
                self._check_disjoint(population, records, section, given)
                units = load_units(
                    records,
                    member.features,
                    cache=member.config.state / "features",
                    unit=privacy.unit,
                    cap=privacy.max_records_per_unit,
                    max_units=self._declared(population),
                    key=self.ledger.key,
                    progress=pace(lambda far: self.progress(Moment(str(far))), section.name),
                    views=member.settings.method.views if population == "train" else 1,
                )
                self._loaded[population] = given, units
                return units
            return earlier[1]

        return read

    def _declared(self, population: Population) -> int:
        entry = self.member.entry
        return entry.max_units if population == "train" else entry.evaluation_units

    def _check_count(self, population: Population, records: Dataset) -> None:
        """From identifiers alone, so that nothing is charged for a data set that is larger than declared."""
        by_patient = self.member.settings.privacy.unit == "patient"
        patients = records.patient_ids if by_patient else None
        units = len(set(records.record_ids if patients is None else patients))
        check_declared(units, self._declared(population), dataset=records.name)

    def _check_disjoint(
        self, population: Population, records: Dataset, section: DatasetConfig, given: Dataset | None
    ) -> None:
        """Training and private evaluation are charged apart, which holds for units that are in one of them only."""
        member = self.member
        if population == "evaluation" and member.evaluation_public:
            return
        records.index()
        if member.settings.privacy.unit == "patient":
            mine, what = frozenset(records.patient_ids or ()), "patient"
        else:
            # Arrays have no place: what they hold is known to whoever made them alone.
            place = _place(section) if given is None else None
            mine = frozenset(() if place is None else (f"{place}/{name}" for name in records.record_ids))
            what = "record"
        both = mine & self._seen.get("evaluation" if population == "train" else "train", frozenset())
        if both:
            raise PrivacyError(
                "FS-1229",
                f"{len(both)} {what}(s) are in the training set and in the private evaluation set",
                expected=f"every {what} in one of the two: each set is charged to its own {what}s",
                cure=f"split by {what}, for instance with `holdout` and `part`",
            )
        self._seen[population] = mine


def _names(records: Dataset, *, place: str, given: bool) -> Names:
    files = paths_of(records)
    rows = [f"record/{place}/{name}" for name in records.record_ids]
    return Names(
        patients=[f"patient/{name}" for name in dict.fromkeys(records.patient_ids or ())],
        records=[*([] if given else rows), *([] if files is None else _files(files))],
        rows=rows if given else (),
    )


def _files(paths: Iterable[Path]) -> Iterator[str]:
    """A name for each file that is the same by whatever link or relative path it is reached."""
    folders: dict[Path, Path] = {}
    for path in paths:
        folder = folders.get(path.parent)
        if folder is None:
            folder = folders[path.parent] = path.parent.resolve()
        # To resolve each file by itself would look at every folder above it once for each.
        yield f"file/{path.resolve() if path.is_symlink() else folder / path.name}"


def _place(section: DatasetConfig) -> str:
    """Where a data set's records are: what tells apart records of one name."""
    return f"{section.path.resolve()}/{section.split or ''}"
