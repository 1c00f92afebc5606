"""Sentence frames. `{t}` is a topic, `{v}` a value, `{p}` a parameter's name, `{d}` a verb, `{k}` a linking key.

`split.frames_of` deals each list to train, dev and test.
"""

# fmt: off
GET_VERBS = ("get", "get", "get", "fetch", "lookup", "find", "check", "read", "query", "show", "retrieve", "load")
ACTION_VERBS = ("create", "delete", "update", "open", "close", "start", "stop", "add", "remove", "archive", "move", "copy",
                "rename", "approve", "cancel", "export", "import", "publish", "assign", "book", "lock", "print", "share", "test")
ATTRIBUTES = ("price", "status", "color", "owner", "weight", "rating", "author", "size", "age", "role", "email", "score",
              "balance", "speed", "date", "title", "version", "address", "currency", "language", "history", "level")
LINKS = ("id", "code", "key", "account", "number", "user id", "order id", "token", "serial number", "symbol", "username", "account id")
FIELD_NAMES = ("street", "zip", "city", "name", "size", "min", "max", "year", "month", "key", "value", "phone", "width", "height",
               "color", "from", "to", "level", "lat", "lon", "first", "last", "type", "number")

DESCRIPTIONS = (
    "Get the {t}.", "Get the {t} of a {p}.", "Get the current {t}.", "Look up the {t} of a {p}.", "Returns the {t}.",
    "Retrieve {t} information. Call this when the user asks about the {t}.", "Get {t}", "Gives the {t} for a {p}.",
    "Retrieve current {t} information. Call this when the user asks about the {t}.", "Find the {t} for a {p}.",
    "Fetch the {t} for the given {p}.", "Use this tool to get the {t}.", "Look up the {t}", "Provides {t} data.",
    "Tells the {t} by {p}.", "{t} of a {p}", "Query the {t} database.", "Finds out the {t}.",
)
ACTION_DESCRIPTIONS = (
    "{d} a {t}.", "{d} the {t} with the given {p}.", "Use this to {d} a {t}.", "{d} one {t} by {p}.", "{d} {t}",
    "Tool to {d} the {t}.", "Call this to {d} a {t}.", "{d} a {t}. Needs the {p}.", "Can {d} a {t} for the user.",
    "{d} the user's {t}.", "{d} an existing {t}.",
)
QUERIES = (
    "What's the {t} in {v}?", "What is the {t} of {v}?", "What is the {t} for {v}?", "what's the {t} of {v}?",
    "What's the {t} like in {v} today?", "How is the {t} in {v}?", "Tell me the {t} of {v}.", "Tell me the {t} in {v}",
    "Please get the {t} of {v}.", "Get the {t} for {v}.", "I need the {t} of {v}.", "I want to know the {t} of {v}.",
    "Can you look up the {t} of {v}?", "Could you check the {t} in {v} now?", "Find the {t} for {v}, please.",
    "Check the {t} in {v}.", "Show me the {t} of {v}.", "For {v}, what is the {t}?", "{t} of {v}?", "{t} in {v}", "{v}: {t}?",
    "Do you know the {t} of {v}?", "Give me the {t} for {v}.", "Look up the {t} for {v}.", "{v} {t}?",
    "What about the {t} in {v}?", "Let me know the {t} for {v} right now.", "Which {t} does {v} have?",
    "I am going to {v}. What is the {t} there?", "What {t} has {v}?", "{t} {v}", "I'd like to see the {t} of {v}.",
    "My boss asks for the {t} of {v}.", "Fetch the {t} of {v}.", "{v}'s {t}?", "What's {v}'s {t}?", "Read the {t} of {v} to me.",
    "Would you tell me {v}'s {t}?", "The {t} of {v}, please.", "Find out the {t} for {v}.", "I have {v}. What is its {t}?",
    "Is there a {t} for {v}?", "Report the {t} for {v}.", "We need {v}'s {t} today.", "Query the {t} of {v}.",
)
BARE_QUERIES = (
    "What's the {t}?", "Get the {t}.", "Show me the {t}.", "{t}?", "Tell me the {t}, please.", "I need the {t}.",
    "What is the {t} now?", "Can you check the {t}?", "Give me the {t}.", "Look up the {t}.", "I want to know the {t}.",
)
ACTIONS = (
    "{d} the {t} {v}.", "Please {d} the {t} {v}.", "Can you {d} the {t} {v}?", "{d} {t} {v}", "I want to {d} the {t} {v}.",
    "{d} a {t} for {v}.", "Could you {d} a {t} for {v}?", "I need you to {d} {t} {v}.", "{d} the {t} of {v}.",
    "We have to {d} the {t} {v}.", "Let's {d} the {t} {v}.", "Would you {d} the {t} {v} for me?", "Go and {d} the {t} {v}.",
    "{d} {v} ({t}).", "Time to {d} the {t} {v}.", "Help me {d} the {t} {v}.", "I'd like to {d} a {t} with {v}.", "Just {d} {t} {v}.",
)
FOLLOW_UPS = ("And {v}?", "and in {v}?", "And in {v}?", "What about {v}?", "How about {v}?", "Now {v}.", "And for {v}?",
              "Same for {v}.", "Now the same for {v}, please.", "{v} too.")
HEADS = ("Hi! ", "Hello, ", "Hey Kimi, ", "Please help me. ", "Quick question: ", "Good morning. ", "One more thing: ", "Hey! ",
         "Sorry to bother you. ", "I have a question. ")
TAILS = (" Use the tool to check.", " Use the tool.", " Please use the tool.", " Thanks!", " Use a tool to check.", " Thank you.",
         " It is urgent.", " Be quick.", " Use your tools.", " Call the tool.")
# How a further argument is mentioned.
MENTIONS = (
    "{p} {v}", "with {p} {v}", "{p}: {v}", "{p}={v}", "the {p} is {v}", "{p} should be {v}", "set {p} to {v}", "use {v} as {p}",
    "{v} as the {p}", "using {p} {v}", "where the {p} is {v}", "({p} {v})", "{p} = {v}", "the {p} being {v}", "with {v} as {p}",
    "with a {p} of {v}", "and {p} {v}", "make the {p} {v}",
)
YES = ("with {p}", "{p} on", "turn {p} on", "{p}: true", "{p} yes", "enable {p}", "{p}=true", "with {p} on", "set {p} to true",
       "use {p}", "{p} enabled", "{p} true")
NO = ("without {p}", "{p} off", "turn {p} off", "{p}: false", "no {p}", "disable {p}", "{p}=false", "with {p} off",
      "set {p} to false", "{p} disabled", "{p} no", "{p} false")
JOINS = (", ", " and ", ", ", " with ", "; ")
# Two requests in one message.
BOTH = ("{a} and {b}", "{a}. Also, {b}", "{a}, and also {b}", "{a}; {b}", "{a}. {b}", "{a}, then {b}", "{a}. And {b}", "{a} plus {b}",
        "I need two things: {a} and {b}", "{a}. Also {b}", "{a}, {b}", "{a} as well as {b}", "First {a}. Second, {b}")
# The same for several values.
SEVERAL = ("{l} and {z}", "{l} and {z}", "both {l} and {z}", "{l} as well as {z}", "{l} & {z}", "{l} and also {z}", "{l} plus {z}")
CHAINS = (
    "Get the {k} of {v} and then the {t} for it.", "Look up the {k} of {v}, then get the {t} for that {k}.",
    "Find the {k} for {v} and use it to get the {t}.", "I need the {t} of {v}. You get it by the {k}.",
    "What is the {t} for the {k} of {v}?", "First find the {k} of {v}, then the {t} for this {k}.",
    "With the {k} of {v}, look up the {t}.", "Check {v}'s {k} and then its {t}.", "Use the {k} of {v} to find the {t}.",
    "Tell me the {t}. You need the {k} of {v} for that.", "What's the {t} of {v}? Get the {k} first.",
    "Take the {k} of {v} and get me the {t} for it.", "Get me the {t} that belongs to the {k} of {v}.",
    "Find {v}'s {k}. Then find the {t} for it.", "Read the {k} of {v}; after that read the {t} of that {k}.",
    "For the {k} of {v}, what is the {t}?", "Look for the {k} of {v}. I want its {t}.",
)
# Talk that needs no tool.
GREETINGS = ("hi", "Hi", "Hi!", "hello", "Hello", "Hello!", "hey", "Hey there", "good morning", "Good evening!", "hi there", "Hey!",
             "Good day", "hello there")
WHO = ("who are you?", "Who are you?", "What are you?", "What is your name?", "what's your name?", "Introduce yourself.",
       "Tell me about yourself.", "who made you?", "Who created you?", "are you a robot?", "Who is your maker?", "What's your name, please?",
       "Do you have a name?", "Are you a person?")
THANKS = ("thanks", "Thanks!", "Thank you.", "thank you so much", "Great, thanks!", "ok thanks", "Thank you, that helps.", "Perfect, thanks.")
BYES = ("bye", "Goodbye!", "see you", "good night", "Bye bye", "See you tomorrow.")
BEYOND = ("Tell me a story about {v}.", "Write a poem on {v}", "Why is {v} so {w}?", "Explain {v} to me.", "What do you think about {v}?",
          "Who invented {v}?", "How do I cook {v}?", "Write an essay on {v} and {w}.", "What is the meaning of {v}?", "Sing a song about {v}.",
          "Is {v} better than {w}?", "Why do people like {v}?")
ECHOES = ("Repeat: {v}", "Say {v}", "Repeat after me: {v}", "Please repeat this: {v}", "Echo {v}", 'say "{v}"', "Say this: {v}", "Print {v}")
SUMS = ("What is {a} + {b}?", "{a} + {b} = ?", "what's {a}+{b}?", "Add {a} and {b}.", "{a}+{b}", "How much is {a} plus {b}?", "{a} plus {b}?",
        "Sum of {a} and {b}?")
FACTS = ("The {n} of {x} is {y}.", "{x} has the {n} {y}.", "{x}'s {n} is {y}.", "{x}: {n} {y}.", "As for {x}, the {n} is {y}.")
ABOUT_FACTS = ("What is the {n} of {x}?", "Which {n} does {x} have?", "What's {x}'s {n}?", "Tell me the {n} of {x}.", "{x}'s {n}?",
               "And the {n} of {x}?", "Give me the {n} of {x} from the text.", "According to the text, what is the {n} of {x}?")
INTROS = ("", "Text: ", "Read this. ", "Here is a text: ", "Given: ", "Notes: ", "Look: ", "I wrote this down. ")
# fmt: on
