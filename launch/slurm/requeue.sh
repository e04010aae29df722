# Sourced by the scripts here. run_step COMMAND: run it as a step with srun; if the step was asked to stop and has saved
# (exit code 75), put the job back in the queue, where it goes on with --resume auto.
#
# SLURM signals the batch shell (#SBATCH --signal=B:USR1@...), which hands the signal to the step. Killing srun instead
# would kill the ranks without a save.
#
# A node that fails is SLURM's own affair: it requeues the job when the node has not answered for some minutes. Ranks
# that notice first end the step, and the job with it; so after a failure on several nodes all of them are asked.

run_step() {
  local asked=0 code=0 step
  trap 'asked=1; echo "$(date +%T) asked to stop"; scancel --signal=USR1 "$SLURM_JOB_ID" || true' USR1 TERM
  echo "$(date +%T) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
  # One rank that dies takes the others with it: they would wait for it until their time-out.
  srun --kill-on-bad-exit=1 "$@" &
  step=$!
  while true; do # a signal that is trapped ends the wait before the step does
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  echo "$(date +%T) the step ended with exit code $code"
  if [ "$code" -ne 75 ] && { [ "$asked" -eq 0 ] || [ "$code" -le 2 ]; }; then
    if [ "$code" -eq 0 ] || nodes_answer; then
      return "$code"
    fi
    echo "$(date +%T) a node does not answer"
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
    echo "not requeued: $MAX_RESTARTS restarts"
    return "$code"
  fi
  scontrol requeue "$SLURM_JOB_ID"
}

nodes_answer() {
  local nodes="${SLURM_JOB_NUM_NODES:-1}"
  [ "$nodes" -eq 1 ] ||
    timeout 120 srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --gres=none true
}
