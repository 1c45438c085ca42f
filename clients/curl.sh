#!/usr/bin/env bash
# The same without an SDK. Usage: curl.sh, with RAEE_BASE_URL and RAEE_MODEL in the environment
# where the defaults do not fit.
set -euo pipefail

url=${RAEE_BASE_URL:-http://localhost:8000/v1}
key=${OPENAI_API_KEY:-none}

ask() { # ask PATH JSON: the x-raee headers, then the body
  curl --silent --show-error --fail-with-body --include "$url/$1" \
    --header "Authorization: Bearer $key" --header "Content-Type: application/json" --data "$2" |
    tr -d '\r' | grep --ignore-case --extended-regexp '^(x-raee-|data:|\{)'
  echo
}

model=${RAEE_MODEL:-$(curl --silent --show-error --fail --header "Authorization: Bearer $key" \
  "$url/models" | sed --regexp-extended 's/^[^[]*\[\{"id":"([^"]+)".*/\1/')}

echo "# Two prompts of a task, each at its own depth"
ask completions '{
  "model": "'"$model"'",
  "prompt": ["A beautiful film. It was", "The soup was cold. It was"],
  "temperature": 0,
  "raee": {"task": "demo_sentiment"}
}'

echo "# The depth set by hand, streamed"
ask chat/completions '{
  "model": "'"$model"'",
  "messages": [{"role": "user", "content": "Name a thing that floats."}],
  "temperature": 0, "max_tokens": 8, "stream": true,
  "raee": {"exit_layer": "full"}
}'

echo "# A bad value: the answer says what is allowed"
ask completions '{
  "model": "'"$model"'", "prompt": "Hello", "raee": {"exit_layer": 0}
}' || true
