"""Does each promise's test fail once what protects the promise is taken out?

    python studies/protections.py --rows docs/rows/protections.csv

For each protection a copy of the checkout is edited, and the one test that docs/reliability.md
names is run in it. It must fail. Rows that are there are not run again unless the edit or the
test has changed; ``--only WORD`` takes the tests whose name holds the word.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

# each takes seconds, and none of them knows this package; they are imported once
for _name in ("torch", "torchvision", "lightning.pytorch", "timm", "pandas", "hypothesis", "scipy"):
    importlib.import_module(_name)

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("test", "taken_out", "failed", "said", "state")
#: Seconds that a test is given; one that hangs without its protection has failed.
LIMIT = 600
_ANY_PATH = re.compile(r"(/[\w.-]+)+/")


@dataclass(frozen=True)
class Protection:
    """What stands in a file, and what stands there once the protection is taken out.

    Attributes:
        test: that docs/reliability.md names, or one of its cases, below ``tests``.
        what: the protection, in words.
        file: where it stands.
        old: its text, which the file holds once.
        new: the text without it.
    """

    test: str
    what: str
    file: str
    old: str
    new: str = ""


TRAIN, CALLBACKS = "iecl_solo/train", "iecl_solo/train/callbacks"
# what two tests check, each in its own way
_DEAD_CLAIM = (
    "a dead worker's claim counts for nothing",
    "iecl_solo/experiments/store.py",
    "        lease = SoftFileLease(marker,",
    "        if marker.exists():\n            return False\n        lease = SoftFileLease(marker,",
)
PROTECTIONS = (
    # --- a run that is stopped goes on
    Protection(
        "train/test_resume.py::test_signal_in_mid_epoch_saves_and_goes_on_bit_for_bit",
        "the save of a stop in mid-epoch",
        f"{CALLBACKS}/checkpoints.py",
        "if (stop or due) and step != self._saved_step:",
        "if due and step != self._saved_step:",
    ),
    Protection(
        "train/test_resume.py::test_signal_in_mid_epoch_saves_and_goes_on_bit_for_bit",
        "the sums behind the epoch's means",
        f"{CALLBACKS}/checkpoints.py",
        "        self._sums = {key: (sums[0], sums[1]) "
        'for key, sums in state_dict["sums"].items()}',
        "        pass",
    ),
    Protection(
        "train/test_resume.py::test_signal_in_mid_epoch_saves_and_goes_on_bit_for_bit",
        "the seed of each step",
        f"{CALLBACKS}/seed.py",
        "        seed_all(self.seed, trainer.current_epoch, batch_idx, 2)",
        "        pass",
    ),
    Protection(
        "train/test_resume.py::test_signal_in_the_last_step_of_an_epoch",
        "the stop at an epoch's end",
        f"{CALLBACKS}/checkpoints.py",
        "        if stop:  # after the last epoch too: what evaluates the run must not begin",
        "        if False:",
    ),
    Protection(
        "train/test_resume.py::test_signal_before_the_first_step_leaves_nothing",
        "the handlers around the training",
        f"{TRAIN}/fit.py",
        "with signals.taken(), _interruptible(trainer):",
        "with _interruptible(trainer):",
    ),
    Protection(
        "train/test_stop.py::test_a_notice_after_the_training_asks_too",
        "the notice's handler in a run's process",
        f"{TRAIN}/processes.py",
        "            with noticed():\n                target(*args)",
        "            target(*args)",
    ),
    Protection(
        "train/test_stop.py::test_a_notice_after_the_training_asks_too",
        "the notice's handler in a command",
        "iecl_solo/cli/hydra_app.py",
        "    with quiet(), noticed():\n        main:",
        "    with quiet():\n        main:",
    ),
    Protection(
        "train/test_resume.py::test_every_n_steps_and_a_power_cut",
        "the save every N steps",
        f"{CALLBACKS}/checkpoints.py",
        "due = self.every_n_steps > 0 and step % self.every_n_steps == 0",
        "due = False",
    ),
    Protection(
        "train/test_resume.py::test_with_accumulated_gradients",
        "the wait for an accumulation's end",
        f"{CALLBACKS}/checkpoints.py",
        "if batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:",
        "if batch_idx == 0:",
    ),
    Protection(
        "train/test_resume.py::test_skipping_is_exact_and_decodes_nothing",
        "an order that leaves out what was seen",
        "iecl_solo/order.py",
        "first = batches * self.batch_size if epoch == self.epoch else 0",
        "first = 0",
    ),
    Protection(
        "train/test_resume.py::test_skipping_is_exact_and_decodes_nothing",
        "the seed of each image's views",
        "iecl_solo/order.py",
        "        seed_cpu(self.seed, epoch, index)\n",
    ),
    Protection(
        "train/test_resume.py::test_killed_before_its_result_the_run_is_completed",
        "the logged row that is written again",
        f"{CALLBACKS}/history.py",
        "if not trainer.is_global_zero or not self.rows:",
        "if True:",
    ),
    Protection(
        "train/test_resume.py::test_killed_before_its_result_the_run_is_completed",
        "the epochs' values in the checkpoint",
        f"{CALLBACKS}/history.py",
        '        self.rows = dict(state_dict["rows"])',
        "        pass",
    ),
    Protection(
        "train/test_resume.py::test_seconds_are_those_of_all_legs",
        "the seconds of the legs before",
        f"{CALLBACKS}/cost.py",
        "        self._before = {name: state_dict[name] for name in self._before}\n",
    ),
    Protection(
        "solo/test_checkpoint.py::test_finished_run_is_not_trained_again",
        "the look for a result",
        f"{TRAIN}/fit.py",
        "    if run.result is not None:\n        run.check()",
        "    if False:\n        run.check()",
    ),
    # --- a checkpoint is whole or it is not there
    Protection(
        "train/test_keep.py::test_kill_in_mid_write_loses_nothing",
        "a file beside, renamed once it is whole",
        "iecl_solo/files.py",
        '    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")',
        "    part = path",
    ),
    Protection(
        "train/test_keep.py::test_so_many_are_kept_newest_first",
        "the removal of older ones",
        f"{TRAIN}/keep.py",
        "                old.unlink()",
        "                pass",
    ),
    Protection(
        "train/test_keep.py::test_so_many_are_kept_newest_first",
        "the one before being kept",
        f"{TRAIN}/keep.py",
        "            if keep > 1:",
        "            if False:",
    ),
    Protection(
        "train/test_keep.py::test_no_damage_is_read_as_something_else",
        "the check sums of a checkpoint",
        "iecl_solo/solo/checkpoint.py",
        "        _check_sums(file)\n        checkpoint",
        "        checkpoint",
    ),
    Protection(
        "train/test_keep.py::test_damaged_newest_falls_back_to_the_one_before",
        "the fall-back",
        f"{TRAIN}/keep.py",
        "            failed = failed or error\n            continue",
        "            raise",
    ),
    Protection(
        "train/test_keep.py::test_missing_key_is_one_line",
        "the look for what Lightning needs",
        f"{TRAIN}/fit.py",
        "    if missing:\n",
        "    if False:\n",
    ),
    Protection(
        "train/test_keep.py::test_missing_tensor_is_one_line",
        "the look for the model's tensors",
        f"{TRAIN}/fit.py",
        "        if names:\n",
        "        if False:\n",
    ),
    Protection(
        "train/test_keep.py::test_full_disk_is_one_line_and_the_same_command_goes_on",
        "the line for a full disk",
        f"{TRAIN}/fit.py",
        "        told = _one_line(error, run)",
        "        told = error",
    ),
    Protection(
        "train/test_keep.py::test_full_disk_is_one_line_and_the_same_command_goes_on",
        "the removal of half a file",
        "iecl_solo/files.py",
        "            part.unlink(missing_ok=True)",
        "            pass",
    ),
    Protection(
        "train/test_keep.py::test_full_disk_at_the_result",
        "the line for a full disk",
        f"{TRAIN}/fit.py",
        "        told = _one_line(error, run)",
        "        told = error",
    ),
    Protection(
        "train/test_keep.py::test_limit_on_a_files_size",
        "the removal of half a file",
        "iecl_solo/files.py",
        "            part.unlink(missing_ok=True)",
        "            pass",
    ),
    Protection(
        "train/test_keep.py::test_advice_to_let_a_file_run_code_is_not_passed_on",
        "tensors and plain values only",
        "iecl_solo/solo/checkpoint.py",
        'torch.load(file, map_location="cpu", weights_only=True)',
        'torch.load(file, map_location="cpu", weights_only=False)',
    ),
    Protection(
        "test_fuzz.py::test_every_flipped_bit_is_found[SAIB]",
        "a SAIB file's check sum",
        "iecl_solo/saib.py",
        "if written is not None and written != _digest(given, state):",
        "if False:",
    ),
    Protection(
        "test_fuzz.py::test_every_flipped_bit_is_found[row]",
        "a row's check sum",
        "iecl_solo/files.py",
        "if written is not None and written != _digest(data):",
        "if False:",
    ),
    Protection(
        "test_fuzz.py::test_every_flipped_bit_is_found[checkpoint]",
        "a checkpoint's check sums",
        "iecl_solo/solo/checkpoint.py",
        "        _check_sums(file)\n        checkpoint",
        "        checkpoint",
    ),
    Protection(
        "test_fuzz.py::test_damaged_bytes_are_one_line_or_what_was_written[monitor]",
        "the check of a log's numbers",
        f"{TRAIN}/logs.py",
        "except (ValueError, KeyError, TypeError, OverflowError) as error:",
        "except ZeroDivisionError as error:",
    ),
    Protection(
        "test_fuzz.py::test_damaged_bytes_are_one_line_or_what_was_written[SAIB]",
        "the line for a file that is no SAIB",
        "iecl_solo/saib.py",
        "    except (OSError, SafetensorError) as error:",
        "    except ZeroDivisionError as error:",
    ),
    Protection(
        "test_fuzz.py::test_much_damage_is_one_line_or_what_was_written[monitor]",
        "the check of a log's numbers",
        f"{TRAIN}/logs.py",
        "except (ValueError, KeyError, TypeError, OverflowError) as error:",
        "except ZeroDivisionError as error:",
    ),
    Protection(
        "test_fuzz.py::test_much_damage_is_one_line_or_what_was_written[checkpoint]",
        "a checkpoint's check sums",
        "iecl_solo/solo/checkpoint.py",
        "        _check_sums(file)\n        checkpoint",
        "        checkpoint",
    ),
    # --- nothing of yours is deleted
    Protection(
        "train/test_run.py::test_what_a_user_set_aside_stays",
        "only what this process wrote is removed",
        f"{TRAIN}/run.py",
        "        if empty:\n            self._remove_own(self._found or ())",
        '        if not self.result:\n            __import__("shutil").rmtree(self.folder)',
    ),
    Protection(
        "train/test_run.py::test_files_that_were_there_before_a_run_stay",
        "what was there is left out of the removal",
        f"{TRAIN}/run.py",
        "for p in self.folder.glob(pattern)} - set(found)",
        "for p in self.folder.glob(pattern)}",
    ),
    Protection(
        "train/test_run.py::test_remains_of_a_killed_write_are_removed",
        "the removal of a killed write's remains",
        f"{TRAIN}/run.py",
        "            part.unlink()",
        "            pass",
    ),
    Protection(
        "train/test_run.py::test_second_identical_command_takes_nothing_from_the_first",
        "the folder's lock",
        f"{TRAIN}/run.py",
        "        self._acquire()\n",
    ),
    Protection(
        "train/test_run.py::test_lock_of_a_killed_process_is_taken_over_at_once",
        "the look for the lock's process",
        f"{TRAIN}/run.py",
        "        lock = SoftFileLease(self.folder / _LOCK, lease_duration=LEASE,",
        "        if (self.folder / _LOCK).exists():\n"
        '            raise IECLError("is being trained")\n'
        "        lock = SoftFileLease(self.folder / _LOCK, lease_duration=LEASE,",
    ),
    Protection(
        "train/test_run.py::test_lock_of_another_machine_is_taken_over_when_it_shows_no_life",
        "the wait for a sign of life",
        f"{TRAIN}/run.py",
        "                lock.acquire(timeout=1.5 * LEASE)",
        "                raise",
    ),
    Protection(
        "solo/test_checkpoint.py::test_another_run_of_that_name_is_not_overwritten",
        "the comparison of settings",
        f"{TRAIN}/run.py",
        "            if key.startswith(_INDIFFERENT) or old.get(key) == new.get(key):",
        "            if True:",
    ),
    Protection(
        "train/test_run.py::test_name_outside_of_the_checkpoints_is_refused",
        "the check of a name",
        f"{TRAIN}/complete.py",
        "        cfg.name = check_name(cfg.name)",
        "        pass",
    ),
    # --- what is wrong is said in one line
    Protection(
        "cli/test_bad_input.py::test_one_line_a_code_and_nothing_written",
        "the schema",
        "iecl_solo/solo/settings.py",
        '    schema.check(plain(cfg), tuple(getattr(method, "blocks", ())))\n',
    ),
    Protection(
        "solo/test_schema.py::test_a_wrong_setting_is_one_line",
        "the schema",
        "iecl_solo/solo/settings.py",
        '    schema.check(plain(cfg), tuple(getattr(method, "blocks", ())))\n',
    ),
    Protection(
        "test_fuzz.py::test_any_single_wrong_key_or_value_is_one_line",
        "the schema",
        "iecl_solo/solo/settings.py",
        '    schema.check(plain(cfg), tuple(getattr(method, "blocks", ())))\n',
    ),
    Protection(
        "test_fuzz.py::test_every_single_wrong_key_or_value_is_one_line",
        "the schema's look for unknown keys",
        "iecl_solo/solo/schema.py",
        '            if key not in known and (alike or not getattr(block_class, "others", False)):',
        "            if False:",
    ),
    Protection(
        "test_fuzz.py::test_many_valid_configurations_build_and_step",
        "filling in what a configuration leaves open",
        "iecl_solo/solo/settings.py",
        "        if OmegaConf.select(cfg, block) is None:",
        "        if False:",
    ),
    Protection(
        "test_fuzz.py::test_any_valid_configuration_builds_and_steps",
        "filling in what a configuration leaves open",
        "iecl_solo/solo/settings.py",
        "        if OmegaConf.select(cfg, block) is None:",
        "        if False:",
    ),
    Protection(
        "test_images.py::test_what_does_not_decode_is_named",
        "the line for an image that does not decode",
        "iecl_solo/images.py",
        "    except (OSError, SyntaxError, ValueError) as error:",
        "    except ZeroDivisionError as error:",
    ),
    Protection(
        "solo/test_on_error.py::test_both_ways_and_both_methods_see_the_same_images",
        "leaving out what does not decode",
        "iecl_solo/solo/data.py",
        "    broken = undecodable(files, Path(root), workers)",
        "    broken = set()",
    ),
    Protection(
        "solo/test_on_error.py::test_a_run_is_stopped_resumed_and_evaluated",
        "leaving out what does not decode",
        "iecl_solo/solo/data.py",
        "    broken = undecodable(files, Path(root), workers)",
        "    broken = set()",
    ),
    # --- a number that is not finite ends the run
    Protection(
        "train/test_finite.py::test_first_number_that_is_not_finite_stops_the_run",
        "the look at each step's numbers",
        f"{CALLBACKS}/finite.py",
        "        if math.isfinite(float(peak)):\n            self._skipped = 0",
        "        if True:\n            self._skipped = 0",
    ),
    Protection(
        "train/test_finite.py::test_gradient_alone",
        "the look at the gradients",
        f"{CALLBACKS}/finite.py",
        "        self._gradients = largest(found)",
        "        self._gradients = None",
    ),
    Protection(
        "train/test_keep.py::test_model_that_is_not_finite_is_not_read",
        "the look at the weights that are read",
        "iecl_solo/solo/checkpoint.py",
        '    if name := _not_finite(checkpoint["state_dict"]):',
        "    if name := None:",
    ),
    Protection(
        "train/test_keep.py::test_json_has_no_nan",
        "null for what is not finite",
        "iecl_solo/files.py",
        "    text = json.dumps(_finite(data), indent=2, allow_nan=False)",
        "    text = json.dumps(data, indent=2)",
    ),
    # --- several processes end together
    Protection(
        "train/test_processes.py::test_one_that_fails_ends_one_that_waits",
        "one that failed ends the others",
        f"{TRAIN}/processes.py",
        "        if any(process.exitcode for process in processes) or told.late:",
        "        if told.late:",
    ),
    Protection(
        "cli/test_devices.py::test_a_rank_that_dies_ends_the_others_in_one_line",
        "the line for a process that was killed",
        f"{TRAIN}/processes.py",
        "        if code is not None and code < 0:",
        "        if False:",
    ),
    Protection(
        "cli/test_devices.py::test_uneven_batches_are_one_line",
        "the comparison before the first step",
        f"{CALLBACKS}/alike.py",
        "                if counts[key] != first:",
        "                if False:",
    ),
    Protection(
        "cli/test_devices.py::test_two_processes_are_one[module]",
        "each process's share of a batch",
        "iecl_solo/order.py",
        "self._order(generator)[rank() :: world_size()]",
        "self._order(generator)",
    ),
    Protection(
        "cli/test_devices.py::test_four_processes_are_one",
        "each process's share of a batch",
        "iecl_solo/order.py",
        "self._order(generator)[rank() :: world_size()]",
        "self._order(generator)",
    ),
    Protection(
        "cli/test_devices.py::test_a_run_says_that_negatives_are_of_one_process",
        "the line about negatives",
        f"{TRAIN}/fit.py",
        "    if count > 1 and host.apart(plain_method):",
        "    if False:",
    ),
    Protection(
        "cli/test_devices.py::test_compare_takes_its_training_with_it[9]",
        "a child's eye on its parent",
        f"{TRAIN}/processes.py",
        "    _leave_with_parent()\n    #",
        "    #",
    ),
    Protection(
        "cli/test_devices.py::test_compare_takes_its_training_with_it[15]",
        "a signal handed on",
        f"{TRAIN}/processes.py",
        "                os.kill(process.pid, number)",
        "                pass",
    ),
    # --- a benchmark's cells
    Protection(
        "experiments/test_benchmark.py::test_kill_in_the_middle_leaves_the_same_store",
        *_DEAD_CLAIM,
    ),
    Protection(
        "experiments/test_benchmark.py::test_a_failed_cell_is_recorded_and_the_others_go_on",
        "a failure is recorded",
        "iecl_solo/experiments/cell.py",
        "            store.fail(cell.id, traceback.format_exc())",
        "            raise",
    ),
    Protection(
        "experiments/test_benchmark.py::test_no_cell_is_claimed_twice",
        "the claim",
        "iecl_solo/experiments/store.py",
        '        if self._status(name) == "done" or not self._acquire(name):',
        '        self._acquire(name)\n        if self._status(name) == "done":',
    ),
    Protection(
        "experiments/test_benchmark.py::test_a_living_process_keeps_its_cell_and_a_dead_one_does_not",
        *_DEAD_CLAIM,
    ),
    Protection(
        "experiments/test_benchmark.py::test_sixteen_writers_lose_no_row",
        "a name of its own for each half file",
        "iecl_solo/files.py",
        '    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")',
        '    part = path.with_name(f"{path.name}.part")',
    ),
    Protection(
        "experiments/test_benchmark.py::test_lost_rows_are_made_again_of_the_runs",
        "the look for runs without a row",
        "iecl_solo/experiments/cell.py",
        '    if benchmark.kind != "training":\n        return 0',
        "    return 0",
    ),
)


def state(protection: Protection) -> str:
    """Changes when the edit or the test does."""
    file, _, name = protection.test.partition("[")[0].partition("::")
    text = (ROOT / "tests" / file).read_text()
    (test,) = (n for n in ast.parse(text).body if getattr(n, "name", None) == name)
    return hashlib.sha256(f"{protection} {ast.unparse(test)}".encode()).hexdigest()[:12]


def copy_of_checkout(to: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("docs/"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_pytest(checkout: Path, test: str, log: Path) -> None:
    """One test in this process, forked of one that has imported the libraries already."""
    os.setsid()  # with what it starts it can be ended
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    os.environ |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=short", "-m", "robust or not robust"]
    code = pytest.main([*options, f"--timeout={LIMIT}", f"tests/{test}"])
    sys.stdout.flush()
    os._exit(int(code))


def tried(protection: Protection, checkout: Path) -> dict[str, object]:
    """The test's outcome in a copy of the checkout without the protection."""
    file = checkout / protection.file
    whole = file.read_text()
    if whole.count(protection.old) != 1:
        raise SystemExit(
            f"{protection.file} holds {whole.count(protection.old)} x {protection.old}"
        )
    file.write_text(whole.replace(protection.old, protection.new))
    log = checkout / "protections.log"
    process = multiprocessing.get_context("fork").Process(
        target=run_pytest, args=(checkout, protection.test, log)
    )
    process.start()
    try:
        process.join(LIMIT)
    finally:
        with suppress(ProcessLookupError):  # it, if it hangs, and what it left running
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        file.write_text(whole)
    said = log.read_text()
    errors = re.findall(r"^E\s+(\S.*)$", said, re.MULTILINE) or [said.strip()[-200:]]
    code = process.exitcode
    # 1: the test ran and failed; more: there was no such test, or pytest itself failed
    outcome = {0: "no", 1: "yes", -signal.SIGKILL: "yes"}.get(code, f"pytest ended with {code}")
    if code == -signal.SIGKILL:
        errors = [f"it hung for {LIMIT} s"]
    return {
        "test": protection.test,
        "taken_out": protection.what,
        "failed": outcome,
        "said": "" if code == 0 else _ANY_PATH.sub("", " ".join(errors[0].split()))[:120],
        "state": state(protection),
    }


def main() -> int:
    """0 if every test that was run failed without its protection."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=Path("protections.csv"))
    parser.add_argument("--only", default="", help="a word in a test's name")
    arguments = parser.parse_args()
    known: dict[tuple[str, str], dict[str, object]] = {}
    if arguments.rows.is_file():
        with arguments.rows.open(newline="") as file:
            known = {(row["test"], row["taken_out"]): dict(row) for row in csv.DictReader(file)}
    rows: dict[tuple[str, str], dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        checkout = Path(temporary)
        copy_of_checkout(checkout)
        for protection in PROTECTIONS:
            key = protection.test, protection.what
            row = known.get(key)
            if arguments.only in protection.test and (
                row is None or row["state"] != state(protection)
            ):
                row = tried(protection, checkout)
                print(f"{row['failed']:>3}  {row['test']}: {row['taken_out']}", flush=True)
                print(f"     {row['said']}", flush=True)
            if row is not None:
                rows[key] = row
            _write(arguments.rows, {**known, **rows} if len(rows) < len(PROTECTIONS) else rows)
    failed = sum(row["failed"] == "yes" for row in rows.values())
    print(f"{failed} of {len(PROTECTIONS)} protections: their test fails without them")
    return int(any(row["failed"] != "yes" for row in rows.values()))


def _write(path: Path, rows: dict[tuple[str, str], dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        out.writeheader()
        out.writerows(rows.values())


if __name__ == "__main__":
    sys.exit(main())
