# What happens on the host after a task has ended.  It knows what no task can: that the task was killed.  It also has
# SLURM's programs, which a container has not.  Set before: code (of srun), requeue, retries, exclude, attempts.

# scontrol requeue sends SIGTERM to this script, which then still has to exclude a bad node.
trap '' TERM
array=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} index=${SLURM_ARRAY_TASK_ID:-0} start=${SLURM_RESTART_COUNT:-0}
# SLURM_JOB_ID of the last task of an array is the number of the array: it would mean all tasks.
task=$array${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
marks=$attempts/$array/$((index / 100))/$index
where=${SLURMD_NODENAME:-$(hostname -s)}

# Whether the task's start $1 ended as one of the other words.
ended() {
    local number=$1 word
    shift
    for word in "$@"; do
        compgen -G "$marks.$number.$word*" > /dev/null && return 0
    done
    return 1
}

again() {
    local pause state
    for pause in 0 1 5 20 60 180; do
        sleep "$pause"
        state=$(squeue --noheader --jobs="$task" --format=%T) || continue
        # SLURM is ending the job or requeues it by itself: a cancelled job must not come back.
        [ "$state" = RUNNING ] || return 1
        scontrol requeue "$task" && return 0
    done
    echo "wmdd: slurmctld does not answer, so the task cannot return to the queue: wmdd slurm submit resumes it"
    return 1
}

# SLURM changes the list of pending tasks alone, and replaces it: each task that returns to the queue does so again.  One
# request reaches all of the array.
exclude_bad_nodes() {
    local bad most
    bad=$(cd "$attempts/$array" && compgen -G "*/*.device.*" | sed 's/.*\.device\.[0-9]*\.//' | sort -u)
    [ -n "$bad" ] || return 0
    most=$(sinfo --noheader --partition="$SLURM_JOB_PARTITION" --format=%D)
    # Where half of the nodes seem bad, the fault is elsewhere, and a task must not wait for ever for a node.
    [ "$(wc -l <<< "$bad")" -le $((most / 2)) ] || return 0
    bad=$(paste -sd, - <<< "$bad")
    scontrol update jobid="$array" excnodelist="${exclude:+$exclude,}$bad" 2> /dev/null
    echo "wmdd: excluded from the rest of this array: $bad"
}

# Every start that Python ends by itself says how.  srun returns 0 where a node was lost.
if [ -z "$(compgen -G "$marks.$start.*")" ]; then
    [ "$code" -ne 0 ] || code=1
    mkdir -p "${marks%/*}"
    rm -f "$marks.$start"
    touch "$marks.$start.killed.$SECONDS.$where"
    [ "$code" -le 128 ] || echo "wmdd: killed by signal $((code - 128)) on $where; memory may be short (memory_gb)"
fi
failures=0
for ((number = 0; number <= start; number++)); do
    ended "$number" failed killed device && failures=$((failures + 1))
done
if ended "$start" done; then
    code=0
elif [ "$requeue" -eq 0 ]; then
    echo "wmdd: not requeued, since the profile says requeue = false: wmdd slurm submit resumes it"
elif ended "$start" stopped; then
    again && echo "wmdd: back into the queue, restart $((start + 1))" && exclude_bad_nodes
elif ended "$start" failed killed device && [ "$failures" -le "$retries" ]; then
    again && echo "wmdd: back into the queue, retry $failures of $retries" && exclude_bad_nodes
fi
exit "$code"
