"""The local HTTP server: OpenAI's and Anthropic's APIs in front of a loaded model.

app: create_app(model, settings), the routes
served: ServedModel, all that the server needs to know of a runtime
openai: /v1/chat/completions; chat_request (with chat_tools) and chat_reply parse and render it, purely
completions, anthropic, responses: the other dialects, each with its modules named alike
parts, sampling, thinking, head, logprobs, progress, sealed: what dialects have in common
models, tokenize: /v1/models; /tokenize and /detokenize
openapi, openapi_schemas: /openapi.json, the description of all of them
guard, origin: host, web page and API key; request ids, the last exception handler
body, fields: hostile JSON → checked values
runs: from a parsed request to running answers and their deltas
failures: which error becomes which status, one table
live: the requests inside and the answers being generated now; whether the server drains
sse, patient: streams and whole answers, kept alive; when the client goes, the answer is parked
retry: which request is a retry of which, and so takes a parked answer up again
options, process, __main__: command line, socket, signals and how the server ends
"""
