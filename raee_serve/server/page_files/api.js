// Requests to the server that this page came from, and its errors as a reader is told them.

const STORED_KEY = "raee-api-key"; // of this tab alone, and gone with it

export class ApiError extends Error {
  // status: of the HTTP answer; 0 without one.
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function apiKey() {
  return sessionStorage.getItem(STORED_KEY) ?? "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(STORED_KEY, key);
  else sessionStorage.removeItem(STORED_KEY);
}

// Paths are relative: the server may be behind a prefix.
export async function getText(path) {
  return (await answered(path, {})).text();
}

export async function getJson(path) {
  return (await answered(path, {})).json();
}

// {json, headers, ms}: ms from sending to the whole answer.
export async function postJson(path, body) {
  const start = performance.now();
  const response = await answered(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" },
  });
  const json = await response.json();
  return { json, headers: response.headers, ms: performance.now() - start };
}

async function answered(path, options) {
  const key = apiKey();
  const authorization = key ? { authorization: `Bearer ${key}` } : {};
  const headers = { ...options.headers, ...authorization };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (key && !/^[\x20-\x7e]*$/.test(key)) {
      throw new ApiError("The API key holds characters that no key has.", 0);
    }
    throw new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw new ApiError(await reason(response, key), response.status);
  return response;
}

async function reason(response, key) {
  if (response.status === 401) {
    return key ? "The server does not accept this API key." : "The server wants an API key.";
  }
  const { error } = await response.json().catch(() => ({}));
  const told = error?.message ?? error;
  return typeof told === "string" ? told : `The server answers ${response.status}.`;
}
