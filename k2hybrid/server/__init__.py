"""The local HTTP server: OpenAI's chat API in front of a loaded model.

app: create_app(model, settings), the routes
served: ServedModel, all that the server needs to know of a runtime
openai: /v1/chat/completions and /v1/models; chat_request and chat_reply parse and render them, purely
tokenize: /tokenize and /detokenize
guard: host check, API key, request ids, the last exception handler
body, fields: hostile JSON → checked values
failures: which error becomes which status, one table
live: the requests inside and the answers being generated now; whether the server drains
sse, patient: streams and whole answers, kept alive; when the client goes, the answer is parked
retry: which request is a retry of which, and so takes a parked answer up again
options, process, __main__: command line, socket, signals and how the server ends
"""
