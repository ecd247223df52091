# shellcheck shell=bash
# Where it runs: Python, nodes and processes, and which Megatron.

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not a program"

# --- nodes and processes: our variables, else SLURM's, else one node ---

NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [[ -z ${NPROC_PER_NODE:-} ]]; then
  if on_cpu; then
    NPROC_PER_NODE=2
  elif [[ ${SLURM_GPUS_ON_NODE:-} =~ ^[1-9][0-9]*$ ]]; then
    NPROC_PER_NODE=$SLURM_GPUS_ON_NODE
  else
    NPROC_PER_NODE=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c ^GPU || true)
    ((NPROC_PER_NODE)) || NPROC_PER_NODE=8 # a login node: say what a job would do
  fi
fi
number NNODES
number NODE_RANK
number NPROC_PER_NODE
WORLD_SIZE=$((NNODES * NPROC_PER_NODE))
((WORLD_SIZE)) || die "NNODES=$NNODES x NPROC_PER_NODE=$NPROC_PER_NODE is no process"

DISTRIBUTED_ARGS=(--nproc-per-node "$NPROC_PER_NODE")
if ((NNODES == 1)); then
  DISTRIBUTED_ARGS+=(--standalone) # finds a free port by itself
else
  if [[ -z ${RDZV_ENDPOINT:-} ]]; then
    if [[ -n ${SLURM_JOB_NODELIST:-} ]] && command -v scontrol >/dev/null; then
      read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
        die "scontrol names no host of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST: give RDZV_ENDPOINT=host:port"
      # A port of its own for each job, below Linux's range of outgoing ports: nodes may be shared.
      RDZV_ENDPOINT=$first:$((20000 + ${SLURM_JOB_ID:-0} % 10000))
    elif [[ -n $DRY_RUN ]]; then
      RDZV_ENDPOINT=FIRST_NODE:29500
      note "RDZV_ENDPOINT is unset: FIRST_NODE:29500 stands for the first node's name and a free port"
    else
      die "$NNODES nodes need RDZV_ENDPOINT=host:port, a port of the first node that the others reach"
    fi
  fi
  # Ranks follow the order of the host names, so that neighbours in a pipeline are neighbours in the rack where names are.
  DISTRIBUTED_ARGS+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT")
  DISTRIBUTED_ARGS+=(--rdzv-id "${RDZV_ID:-${SLURM_JOB_ID:-$MODEL}}")
fi

# GiB of one GPU, by which layouts are judged.
if on_cpu; then
  GPU_MEMORY_GIB=0
elif [[ -z ${GPU_MEMORY_GIB:-} ]]; then
  mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1 || true)
  [[ $mib =~ ^[0-9]+$ ]] && GPU_MEMORY_GIB=$((mib / 1024)) || GPU_MEMORY_GIB=80 # H100
fi

# --- Megatron: a checkout's own script, or this package's for Megatron-Core from pip ---

ENVIRONMENT=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
if on_cpu; then
  ENVIRONMENT+=(MEGATRON_ET_CPU=1)
else
  # Megatron asks for 1 where tensor or context parallelism overlaps with compute before Blackwell.
  ENVIRONMENT+=("CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}")
  # The sizes of an expert's tensors change with every step: without it the allocator fragments.
  ENVIRONMENT+=("PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}")
  # Values of a site's fabric go into the job's own environment; torchrun hands all of it on. For example:
  #   NCCL_SOCKET_IFNAME=eth0       the interface of the rendezvous and of NCCL's bootstrap
  #   NCCL_IB_HCA=mlx5_0,mlx5_1     the adapters that carry the traffic
  #   NCCL_IB_QPS_PER_CONNECTION=2  for fabrics with adaptive routing
  #   NCCL_NVLS_ENABLE=0            gives back the memory of NVLink SHARP's buffers
fi
# The code whose revision is logged is the code that runs, whatever is installed.
if [[ -n ${MEGATRON:-} ]]; then
  [[ -f $MEGATRON/pretrain_gpt.py ]] || die "MEGATRON=$MEGATRON holds no pretrain_gpt.py: name a Megatron-LM checkout"
  MEGATRON=$(cd "$MEGATRON" && pwd)
  SCRIPT=(-m megatron_et "$MEGATRON/pretrain_gpt.py")
  ENVIRONMENT+=("PYTHONPATH=$REPOSITORY:$MEGATRON${PYTHONPATH:+:$PYTHONPATH}")
else
  SCRIPT=(-m megatron_et.pretrain_gpt)
  ENVIRONMENT+=("PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}")
fi

found=$(env "${ENVIRONMENT[@]}" "$PYTHON" "$EXAMPLES/common/find_megatron.py") || exit 2
IFS=$'\t' read -r MEGATRON_VERSION MEGATRON_FLAGS MUON <<<"$found"
[[ $MEGATRON_FLAGS != - ]] ||
  die "megatron-core $MEGATRON_VERSION has no megatron.training: set MEGATRON=/path/to/Megatron-LM, or install 0.17 or newer"

# Whether this Megatron's flags know a word: asked by feature, since branches and forks lie about their versions.
megatron_has() { grep -qF -e "$1" "$MEGATRON_FLAGS"; }
