# One image for everything: head, workers, replicas, jobs, and the MLflow server.
#
#   docker build -t ptuning:0.1.0 .                                                         # CPU, on Ray's image
#   docker build -t ptuning:0.1.0 --build-arg BASE=rayproject/ray:2.60.0-py311-gpu .        # GPU
#
# BASE is any image of Debian's family with Python 3.11 or newer; from it come Python, the C library and the user's tools,
# and every Python package comes from constraints.txt. No compiler is needed, neither here nor at run time.
# EFA_INSTALLER adds AWS's network (see below). TORCH_INDEX is a pip index to take torch from: without one it is PyPI's, a CUDA build of some GB on x86-64;
# pytorch.org names the index of its CPU builds.
ARG BASE=rayproject/ray:2.60.0-py311-cpu
FROM ${BASE}

USER root
SHELL ["/bin/sh", "-euc"]

# KubeRay's probes call wget, the cluster launcher calls rsync. The user is Ray's: its images and their volumes expect it.
# Without sudo, since this user runs whatever a job brings.
RUN missing=""; for tool in wget rsync; do command -v $tool >/dev/null || missing="$missing $tool"; done; \
    if [ -n "$missing" ]; then \
        apt-get update; apt-get install -y --no-install-recommends $missing; rm -rf /var/lib/apt/lists/*; \
    fi; \
    id ray >/dev/null 2>&1 || useradd --create-home --non-unique --uid 1000 --gid users --shell /bin/bash ray; \
    if [ -e /etc/sudoers ]; then sed -i '/^ray /d' /etc/sudoers; fi

# RDMA between nodes (InfiniBand, RoCE): without these libraries NCCL silently uses TCP. For EFA, EFA_INSTALLER is the URL of AWS's
# installer (a tar.gz), which brings libfabric and NCCL's plugin for it.
ARG EFA_INSTALLER=
RUN apt-get update; apt-get install -y --no-install-recommends libibverbs1 ibverbs-providers librdmacm1; \
    if [ -n "$EFA_INSTALLER" ]; then \
        mkdir /tmp/efa; wget -qO- "$EFA_INSTALLER" | tar -xz -C /tmp/efa --strip-components=1; cd /tmp/efa; \
        ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify; \
        find /opt/amazon -name 'libnccl-net*.so' -printf '%h\n' | sort -u > /etc/ld.so.conf.d/nccl-net.conf; \
        [ -s /etc/ld.so.conf.d/nccl-net.conf ]; ldconfig; rm -rf /tmp/efa; \
    fi; \
    rm -rf /var/lib/apt/lists/*

# An environment of its own: what the base image brings in Python packages cannot mix with the pinned ones.
ENV VIRTUAL_ENV=/opt/ptuning PATH=/opt/ptuning/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV; \
    echo "export PATH=$VIRTUAL_ENV/bin:\$PATH" | tee /etc/profile.d/ptuning.sh >> /home/ray/.bashrc

# Dependencies: a layer of its own, which a change of the code leaves alone. torch first, as in the Makefile.
ARG TORCH_INDEX=
WORKDIR /tmp/build
COPY constraints.txt pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["server"], sep="\n")' > requirements.txt; \
    pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url $TORCH_INDEX} torch; \
    DS_BUILD_OPS=0 pip install --no-cache-dir -c constraints.txt -r requirements.txt

# The package with the built-in base and its tasks, and the experiment files.
COPY README.md LICENSE ./
COPY ptuning ptuning
RUN pip install --no-cache-dir --no-deps .; rm -rf /tmp/build
COPY --chown=1000:100 jobs /home/ray/ptuning/jobs
RUN mkdir -p /home/ray/ptuning/runs; chown 1000:100 /home/ray/ptuning /home/ray/ptuning/runs

# A node without a token must not start: with this mode `ray start` refuses. A job that is stopped gets SIGINT and a
# minute to save. Serve's proxies are guarded (ptuning/serving/proxy.py). Nothing reports home.
ENV RAY_AUTH_MODE=token \
    RAY_JOB_STOP_SIGNAL=SIGINT \
    RAY_JOB_STOP_WAIT_TIME_S=60 \
    RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=ptuning.serving.proxy:middlewares \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    DO_NOT_TRACK=true \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    TOKENIZERS_PARALLELISM=false \
    PYTHONUNBUFFERED=1 \
    HOME=/home/ray

USER 1000:100
WORKDIR /home/ray/ptuning
EXPOSE 6379 8265 8000
# Asks the agent of the Ray node in this container (its health needs no token).
HEALTHCHECK --start-period=60s --interval=15s --timeout=5s --retries=4 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:52365/api/local_raylet_healthz', timeout=4)"]
CMD ["ptuning", "--help"]
