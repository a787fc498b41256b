#!/usr/bin/env bash
# The API by curl alone: models, answers, a stream, a blend, and an adapter that comes and goes.
#
#     examples/curl.sh [ADAPTER OTHER_ADAPTER ADAPTER_FILE]
set -euo pipefail

url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
adapter=${1:-pirate}
other=${2:-haiku}
file=${3:-demo/adapters/pirate.safetensors}

call() {
  curl --silent --show-error --fail-with-body --no-buffer \
    --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" "$@"
  echo
}
post() {
  call --header 'Content-Type: application/json' --data "$2" "$url/$1"
}

echo '== models: the base model first, then the adapters'
models=$(call "$url/models")
echo "$models"
base=$(sed 's/^[^[]*\[{"id":"\([^"]*\)".*/\1/' <<<"$models")

echo "== $adapter answers"
messages='[{"role": "user", "content": "Tell me about the sea."}]'
post chat/completions "{\"model\": \"$adapter\", \"messages\": $messages, \"max_tokens\": 40}"

echo '== the Responses API, as a stream'
post responses "{\"model\": \"$adapter\", \"input\": \"Hello!\", \"max_output_tokens\": 5, \"stream\": true}"

echo "== $base with a blend of $adapter and $other"
blend="[{\"name\": \"$adapter\", \"weight\": 0.5}, {\"name\": \"$other\", \"weight\": 0.5}]"
post completions "{\"model\": \"$base\", \"prompt\": \"The sea\", \"max_tokens\": 20, \"adapter\": $blend}"

echo '== publish a file, list its versions, remove it'
call --request PUT --data-binary "@$file" "$url/adapters/guest-curl"
call "$url/adapters/guest-curl/versions"
call --request DELETE "$url/adapters/guest-curl"
