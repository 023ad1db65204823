# The image of every service: `docker build -t fastworker .`; the command is a subcommand of fastworker.
FROM python:3.13.2-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deploy/requirements.txt ./deploy/
COPY fastworker ./fastworker
# Exactly what was tested, by hash; scripts/release --lock makes the list anew.
RUN python -m venv /opt/fastworker \
    && /opt/fastworker/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes -r deploy/requirements.txt \
    && /opt/fastworker/bin/pip install --no-cache-dir --no-compile --no-deps . \
    && /opt/fastworker/bin/python -m compileall -q /opt/fastworker \
    && /opt/fastworker/bin/pip uninstall --yes pip

FROM python:3.13.2-slim-bookworm
COPY --from=build /opt/fastworker /opt/fastworker
# A volume that is mounted there belongs to the user below: the reader's chain of commits, with FASTWORKER_HOME.
RUN install -d -o 10001 -g 10001 /var/lib/fastworker
# Nothing else is written: the root file system may be read-only. In a container the port has to be reachable from outside.
ENV PATH=/opt/fastworker/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FASTWORKER_HTTP_HOST=0.0.0.0
USER 10001:10001
WORKDIR /
EXPOSE 9400 9401
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["fastworker", "health"]
ENTRYPOINT ["fastworker"]
CMD ["--help"]
