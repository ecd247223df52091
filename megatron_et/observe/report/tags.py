"""Names in TensorBoard files."""

# Megatron's (megatron/training/training.py: training_log and evaluate_and_print_results).
TRAINING_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
SECONDS_PER_STEP = "iteration-time"
BY_SAMPLES = " vs samples"

# Text that this package logs beside Megatron's arguments (host/tensorboard.py).
OWN_TEXT = "megatron_et/"
ALARM_TEXT = "megatron_et/alarms"
VERSIONS_TEXT = "megatron_et/versions"
