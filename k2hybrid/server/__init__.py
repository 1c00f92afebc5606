"""The local HTTP server: OpenAI's chat API in front of a loaded model.

app: create_app(model, settings), the routes
served: ServedModel, all that the server needs to know of a runtime
openai: /v1/chat/completions and /v1/models; chat_request and chat_reply parse and render them, purely
tokenize: /tokenize and /detokenize
guard: host check, API key, request ids, the last exception handler
body, fields: hostile JSON → checked values
failures: which error becomes which status, one table
live: the answers being generated now
sse, patient: streams and whole answers, kept alive, and ended when the client goes
options, process, __main__: command line, socket, signals
"""
