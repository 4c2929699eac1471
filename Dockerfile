# The challenge container. build.sh lays out the build context (verified weights, wheelhouse) and calls this: see docs/submit.md.
# Any Debian or Ubuntu base with Python 3.10 to 3.12 serves; one that has python3 already is built on without a network.
ARG BASE=nvidia/cuda:12.8.1-runtime-ubuntu22.04@sha256:fcbbd60a5ad3db3a1c7375bf14546b369b54064c513224310b2026df50c7a9bd

FROM ${BASE} AS python
RUN command -v python3 > /dev/null || { \
        apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*; }

# Packages are installed in stages of their own: pip, its cache and the wheels stay behind. Each file is checked against its hash.
# pip runs from its own wheel where there is a wheelhouse, and is the distribution's where wheels come from an index.
FROM python AS wheels
# (LICENSE only because a COPY needs a source that is always there.)
COPY LICENSE wheelhouse* /wheelhouse/
RUN ls /wheelhouse/pip-*.whl > /dev/null 2>&1 || { apt-get update && apt-get install -y --no-install-recommends python3-pip; }
RUN { echo '#!/bin/sh -e'; \
      if ls /wheelhouse/pip-*.whl > /dev/null 2>&1; then \
          echo "export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheelhouse PYTHONPATH=$(ls /wheelhouse/pip-*.whl)"; \
      fi; \
      echo 'python3 -m pip install --require-hashes --no-deps --only-binary=:all: --no-compile --no-cache-dir --quiet \'; \
      echo '    --disable-pip-version-check --target "$2" --requirement "$1"'; \
    } > /usr/local/bin/install-locked && chmod 755 /usr/local/bin/install-locked

# torch by itself, so that a change of a small package leaves the layer of several GB alone. Cut: headers, test programs, tools.
# Compiled once, since no container can write it later. (A few of its files are for newer Pythons and do not compile.)
FROM wheels AS torch
ARG TORCH=cuda12
COPY locks/torch-${TORCH}.txt /build/
RUN install-locked /build/torch-${TORCH}.txt /opt/torch \
 && cd /opt/torch && rm -rf bin torch/include torch/share torch/test && find torch/bin -type f ! -name torch_shm_manager -delete \
 && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash . || true; }

# Cut: programs, the packages' own tests with their data (numpy imports a part of its own), and the installers that evalutils asks
# for and never imports.
FROM wheels AS packages
COPY locks/packages.txt /build/
RUN install-locked /build/packages.txt /opt/packages \
 && cd /opt/packages && rm -rf bin share pip pip-* piptools pip_tools-* build build-* wheel wheel-* setuptools setuptools-* \
        pkg_resources _distutils_hack distutils-precedence.pth cookiecutter cookiecutter-* \
 && find . -path ./numpy -prune -o -type d -name tests -prune -exec rm -rf {} + \
 && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash . || true; }

FROM python
COPY --from=torch /opt/torch /opt/torch
COPY --from=packages /opt/packages /opt/packages
RUN mkdir -p /input /output /opt/ml/model /oncoreg/data /oncoreg/model /oncoreg/results
# Nothing may be written outside /output and /tmp. torch's CUDA 12 build runs on every driver from 525 on, which is CUDA 12.0: the
# base's own requirement would refuse older drivers than it has to. Threads that wait must sleep: where a container is given a part of
# the processors that it sees, spinning takes ten times as long.
ENV PYTHONPATH=/opt/dinoreg:/opt/packages:/opt/torch \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    OMP_WAIT_POLICY=PASSIVE \
    NVIDIA_REQUIRE_CUDA="cuda>=12.0"
# OncoReg overrides the entry point with the relative path ./test.sh.
WORKDIR /oncoreg
COPY oncoreg/ /oncoreg/
COPY LICENSE process.py /opt/dinoreg/
COPY dinoreg/ /opt/dinoreg/dinoreg/
COPY weights/ /opt/dinoreg/weights/
# The solvers' loops, compiled for any processor with AVX2, which is fixed so that the machine that runs them need not be the one that
# built them. A start copies them to /tmp; were they missing there, it would compile them, in ten seconds.
ENV NUMBA_CPU_NAME=x86-64-v3 NUMBA_CPU_FEATURES=+avx2,+fma,+bmi2 NUMBA_CACHE_DIR=/opt/dinoreg/compiled
RUN python3 -c 'import dinoreg.kernels' && chmod -R a+rX /opt/dinoreg/compiled
# Any uid will do; this one belongs to nobody.
USER 64000:64000
ENTRYPOINT ["python3", "/opt/dinoreg/process.py"]
