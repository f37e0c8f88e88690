"""The table of faults outside of publishing, each with the test that tries it; CONTRIBUTING.md holds the table.

`python -m tests.fault_table` writes it. Publishing has a table of its own, from `tests.publish.hub_faults`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pivot_hub.files import write_whole

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- all faults: python -m tests.fault_table -->", "<!-- end of all faults -->"
HEADER = "| fault | what happens | what is lost | the same command again | test |"


class Fault(NamedTuple):
    """A fault and what follows from it.

    Args:
        fault: What goes wrong.
        effect: What the command does.
        lost: What is lost.
        again: What the same command does again.
        file: File of the test, below `tests/`.
        test: Name of the test function.
    """

    fault: str
    effect: str
    lost: str
    again: str
    file: str
    test: str


FAULTS = [
    # Training
    Fault("train: a second run on one output", "refused: process, host, since", "nothing", "runs once the first has ended", "training/test_checkpoints.py", "test_a_second_run_is_refused_and_touches_nothing"),
    Fault("train: SIGKILL", "lock and work folder stay", "steps since the last checkpoint", "takes the lock over and resumes", "test_kills.py", "test_train"),
    Fault("train: SIGTERM, Ctrl-C, SIGHUP, SIGUSR1", "saves the step, exit code 3", "nothing", "resumes", "training/test_preemption.py", "test_a_signal_stops_after_the_step"),
    Fault("train: a second Ctrl-C", "ends at once", "steps since the last checkpoint", "resumes", "training/test_preemption.py", "test_a_second_ctrl_c_stops_at_once_but_not_one_that_a_launcher_passes_on"),
    Fault("train: a damaged checkpoint", "passed over by name", "steps since the one before", "resumes from the one before", "training/test_checkpoints.py", "test_a_damaged_checkpoint_is_passed_over_by_name"),
    Fault("train: every checkpoint damaged", "refused by name", "the run", "starts again", "training/test_checkpoints.py", "test_the_only_checkpoint_is_damaged"),
    Fault("train: a checkpoint cut off while written", "cleared", "steps since the one before", "resumes from the one before", "training/test_checkpoints.py", "test_a_checkpoint_cut_off_while_written_is_cleared"),
    Fault("train: shards cut off while written", "not resumed from", "steps since the one before", "resumes from the one before", "training/test_processes.py", "test_shards_cut_off_while_written_are_not_resumed"),
    Fault("train: a damaged file of the reference cache", "deleted with a warning", "its rows", "computes those rows", "training/test_tree_layout.py", "test_a_damaged_file_of_the_cache_is_made_again"),
    Fault("train: trained weights are not finite", "refused", "the run", "fails again: lower the learning rate", "training/test_checkpoints.py", "test_weights_that_are_not_finite_are_never_a_finished_run"),
    Fault("train: the loss is not finite", "stops and keeps the last checkpoint", "steps since then", "fails again: lower the learning rate", "training/test_stages.py", "test_a_loss_that_is_not_finite_stops_the_run"),
    Fault("train: the loss explodes", "stops; the rows of the step are written", "steps since the last checkpoint", "fails again: lower the learning rate", "training/test_processes.py", "test_a_loss_that_diverges_names_its_rows"),
    Fault("train: the disk is full", "stops with one message", "steps since the last checkpoint", "resumes", "training/test_stages.py", "test_a_full_disk_keeps_the_last_checkpoint"),
    Fault("train: the output holds other files", "refused by name", "nothing", "the same", "training/test_checkpoints.py", "test_an_output_with_other_files_is_refused_and_not_touched"),
    Fault("train: an error in one of several processes", "all processes end", "steps since the last checkpoint", "resumes", "training/test_processes.py", "test_an_error_of_every_process_ends_them_all"),
    Fault("train: the parent is another model", "refused before it is loaded", "nothing", "the same", "training/test_processes.py", "test_a_parent_of_another_model_is_refused_before_it_is_loaded"),
    Fault("train: a reward raises an error, or is not finite", "stops; the reward and the rows are named", "steps since the last checkpoint", "fails again: fix the reward", "training/rewards/test_load.py", "test_a_reward_that_fails_is_named_with_its_rows"),
    Fault("train: the answers of every prompt get the same reward", "stops after `stop_without_signal` steps, with the reason", "steps since the last checkpoint", "fails again: change rewards or rows", "training/test_groups.py", "test_a_run_whose_answers_all_get_the_same_reward_stops_with_the_reason"),
    # Data
    Fault("data: a row that no reward can score", "named; raised or skipped", "that row", "the same", "training/rewards/test_rows.py", "test_a_row_that_no_reward_can_score_is_a_bad_row"),
    Fault("data: a damaged row index", "built again", "nothing", "reads it", "data/test_index.py", "test_an_index_with_a_flipped_bit_or_cut_short_is_built_again"),
    Fault("data: an archive changed after indexing", "the index is built again", "nothing", "reads it", "data/test_index.py", "test_an_index_into_an_archive_that_changed_is_built_again"),
    Fault("data: two processes build one index, or one is killed", "the second waits, or takes over", "nothing", "reads it", "data/test_index.py", "test_a_second_process_waits_for_the_index_and_a_killed_one_is_taken_over"),
    Fault("data: a corrupt image, whatever its decoder raises", "named; raised or skipped", "that row", "the same", "data/test_rows.py", "test_a_corrupt_tiff_among_photos_is_one_bad_row"),
    Fault("data: a zip member of gigabytes", "refused before it is unpacked", "that row", "the same", "data/test_image.py", "test_a_zip_member_larger_than_an_image_is_refused_before_it_is_unpacked"),
    Fault("data: a table that names files elsewhere, or a pipe", "refused", "that row", "the same", "data/test_image.py", "test_a_table_names_files_of_its_own_data_set_only"),
    Fault("data: a file name that is not UTF-8", "refused before any work", "nothing", "works once it is renamed", "data/test_image.py", "test_a_name_that_is_not_utf8_is_refused_before_any_work"),
    Fault("data: a source without a usable row", "refused by name", "nothing", "the same", "data/test_rows.py", "test_one_source_without_a_usable_row_is_named"),
    Fault("data pairs: text alone tells the answers", "refused by kind", "nothing", "the same", "data/test_pairs.py", "test_answers_that_text_alone_tells_are_refused"),
    Fault("data pairs: an MLLM answers all right, all wrong, or unclearly", "left out and counted", "that question", "the same", "data/test_on_policy.py", "test_questions_without_a_right_or_a_wrong_answer_are_counted"),
    Fault("data pairs: an MLLM errs in one direction", "rows are left out until they balance", "those rows", "the same", "data/test_on_policy.py", "test_a_policy_that_errs_one_way_gives_few_rows_and_never_a_prior"),
    Fault("data pairs: the output holds other files", "refused by name", "nothing", "the same", "data/test_pairs.py", "test_the_output_follows_from_inputs_and_seed_and_replaces_only_its_own"),
    Fault("recipe: a key given twice", "refused with its line", "nothing", "works once one is removed", "config/test_yaml_loader.py", "test_recipes_studies_prose_overrides_and_class_names_share_the_loader"),
    # Encoders
    Fault("extract: the output holds other files", "refused by name", "nothing", "the same", "encoder/test_repository.py", "test_extracting_again_replaces_an_encoder_and_nothing_else"),
    Fault("export: the output holds other files", "refused by name", "nothing", "the same", "encoder/test_export.py", "test_exporting_again_replaces_an_export_and_nothing_else"),
    Fault("extract: SIGKILL at any moment", "the output is the old one or the new one", "nothing", "clears what was left", "test_kills.py", "test_a_killed_extract_leaves_the_encoder_that_was_there"),
    Fault("export: SIGKILL at any moment", "the output is absent or whole", "nothing", "clears what was left", "test_kills.py", "test_export"),
    Fault("export: the ONNX model gives other features", "refused", "nothing", "the same", "encoder/test_export.py", "test_an_export_that_differs_is_not_kept"),
    Fault("encode: the output is another's, or in use", "refused: process, host, since", "nothing", "works after the first", "encoder/test_encode.py", "test_files_of_others_and_of_running_processes_are_not_touched"),
    Fault("encode: SIGKILL", "finished parts stay", "at most one part", "resumes", "test_kills.py", "test_encode"),
    Fault("encode: a damaged part, or one of another encoder", "not used", "nothing", "encodes it again", "encoder/test_encode.py", "test_a_damaged_part_is_encoded_again_and_another_encoders_parts_are_never_used"),
    Fault("encode: an image replaced or added", "seen by its bytes", "nothing", "encodes only that image", "encoder/test_encode.py", "test_only_added_and_replaced_images_are_encoded_again"),
    Fault("encode: SIGKILL while a folder is written", "finished parts stay", "at most one part", "resumes", "test_kills.py", "test_encode_to_a_folder"),
    Fault("encode: a shard cut short", "what precedes the cut is encoded; listed", "nothing", "reads it again", "encoder/test_sources.py", "test_a_shard_cut_short_gives_what_precedes_the_cut_and_is_listed"),
    Fault("encode: a shard that was encoded is cut short or deleted", "its features stay; listed", "nothing", "reads it again", "encoder/test_sources.py", "test_features_of_a_shard_stay_when_it_is_cut_short_or_deleted_later"),
    Fault("encode: an id in two shards", "both rows are kept; listed", "nothing", "the same", "encoder/test_sources.py", "test_ids_that_are_in_two_shards_are_kept_and_listed"),
    Fault("encode: a source that changes while it is read", "listed", "nothing", "encodes what changed", "encoder/test_sources.py", "test_a_source_that_changes_under_a_running_job_is_listed_and_read_again"),
    Fault("encode: a folder of another encoder or job", "refused with what differs", "nothing", "the same", "encoder/test_feature_folders.py", "test_a_folder_of_another_job_is_refused_and_not_touched"),
    Fault("encode: a damaged part of a finished folder", "not used", "nothing", "encodes it again", "encoder/test_feature_folders.py", "test_a_damaged_part_of_a_folder_is_encoded_again"),
    Fault("encode: a block that another process works on", "left to it; process, host, since", "nothing", "works after the other", "encoder/test_feature_folders.py", "test_a_block_that_another_process_works_on_is_left_to_it"),
    Fault("encode: merging folders of other jobs, or damaged", "refused by name", "nothing", "the same", "encoder/test_feature_folders.py", "test_merging_refuses_other_jobs_unfinished_folders_and_damage"),
    Fault("encode: features that are not finite", "stops, naming the image", "nothing", "the same", "encoder/test_encode.py", "test_features_that_are_not_finite_are_named_and_not_written"),
    Fault("encode: worker processes cannot start", "ends with the remedy", "nothing", "resumes", "encoder/test_encode.py", "test_workers_that_cannot_start_end_with_an_error_message"),
    Fault("any: weights of an encoder altered", "refused before any work", "nothing", "the same", "encoder/test_encoder_inputs.py", "test_altered_weights_of_ours_are_never_used"),
    Fault("any: a model that needs code of its repository", "refused, and nobody is asked", "nothing", "the same", "mllm/test_mllm.py", "test_a_strangers_code_is_neither_run_nor_asked_about"),
    Fault("verify: foreign code, pickles or links under a right manifest", "reported", "nothing", "the same", "encoder/test_repository.py", "test_a_strangers_change_is_detected_under_a_right_manifest"),
    # Pull and push
    Fault("pull: the output holds other files", "refused before the download", "nothing", "the same", "publish/test_pull.py", "test_a_folder_with_other_files_is_not_replaced_by_a_pull"),
    Fault("pull, push: a link out of the repository", "neither pulled nor pushed", "nothing", "the same", "publish/test_pull.py", "test_a_link_out_of_the_repository_is_neither_pulled_nor_published"),
    Fault("pull, push: a name that leads out", "refused before the file is used", "nothing", "the same", "publish/test_pull.py", "test_a_name_that_leads_out_is_refused"),
    Fault("push: SIGKILL at any moment", "nothing or everything is published", "nothing", "publishes, and clears what was left", "test_kills.py", "test_push"),
    Fault("any: SIGKILL while temporary files exist", "they stay", "nothing", "deletes them", "test_outputs.py", "test_scratch_folders_of_killed_processes_are_deleted"),
    Fault("pair: the output holds other files", "refused by name", "nothing", "the same", "demo/test_comparison.py", "test_packing_keeps_the_differences_of_the_branches"),
    Fault("push: a secret in compressed or encoded content", "nothing is sent", "nothing", "the same until it is removed", "publish/test_secret_scan.py", "test_what_is_compressed_or_encoded_is_scanned"),
    # Probes
    Fault("probe: damaged cached features", "computed again", "nothing", "uses the new cache", "probes/classification/test_protocols.py", "test_a_damaged_feature_cache_is_computed_again"),
    Fault("probe: features that are not finite", "stops, naming the image", "nothing", "the same", "probes/classification/test_protocols.py", "test_features_that_are_not_finite_are_named"),
    Fault("probe: ambiguous names of folders", "both are named", "nothing", "the same", "probes/classification/test_protocols.py", "test_ambiguous_names_of_parts_are_refused"),
    Fault("compare: a value of a result was edited", "refused by file and row", "nothing", "the same until measured again", "probes/test_probes.py", "test_values_that_do_not_follow_from_the_scores_beside_them_are_refused"),
    Fault("localize: a malformed COCO segmentation", "the annotation is named", "nothing", "the same", "probes/localization/test_gradient_maps.py", "test_coco_crowds_are_left_out_and_bad_segmentations_named"),
    # Space
    Fault("space: a visitor's model loops or takes all memory", "its process ends, with a message", "that call", "a new process", "demo/test_worker.py", "test_a_process_beyond_its_limits_is_ended_and_replaced"),
    Fault("space: all processes are busy", "a message at once", "nothing", "works once one is free", "demo/test_worker.py", "test_busy_processes_refuse_others_at_once"),
    Fault("space: a repository with broken files", "a message that names it", "nothing", "the same", "demo/test_worker.py", "test_a_process_without_memory_ends_and_a_broken_repository_is_named"),
    Fault("space: a value of the wrong type at an endpoint", "a message", "nothing", "the same", "demo/test_space.py", "test_bad_input_gets_a_message_and_the_app_keeps_running"),
    Fault("space: a path of this machine as image", "refused", "nothing", "the same", "demo/test_space.py", "test_nothing_outside_the_upload_folder_is_read"),
    # All
    Fault("any: a damaged file, row, config or recipe", "one message", "nothing", "the same", "test_fuzz.py", "test_damaged_input_ends_with_a_message_and_loses_nothing"),
]  # fmt: skip


def render() -> str:
    """Render the table as Markdown."""
    rows = [f"| {f.fault} | {f.effect} | {f.lost} | {f.again} | `{f.file}::{f.test}` |" for f in FAULTS]
    return "\n".join([HEADER, "|---|---|---|---|---|", *rows])


def insert(page: str, table: str) -> str:
    """Return the page with the table between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def names_of_tests(file: Path) -> set[str]:
    """Names of the test functions of a file."""
    return set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE))


if __name__ == "__main__":
    write_whole(CONTRIBUTING, insert(CONTRIBUTING.read_text(), render()))
