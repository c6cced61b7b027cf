import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Calls the library through java.lang.foreign with nothing but the header: prototypes, structs and constants are
 * read from it. Smoke HEADER LIBRARY MODEL.
 */
public final class Smoke {
    private final String header;
    private final SymbolLookup library;
    private final Arena arena;

    private Smoke(String header, SymbolLookup library, Arena arena) {
        this.header = header;
        this.library = library;
        this.arena = arena;
    }

    private static MemoryLayout layout(String type) {
        if (type.contains("*") || type.matches("nybl_\\w+_fn")) {
            return ValueLayout.ADDRESS;
        }
        switch (type.replace("const ", "").trim()) {
            case "nybl_status":
            case "int32_t":
            case "uint32_t":
                return ValueLayout.JAVA_INT;
            case "uint64_t":
            case "size_t":
                return ValueLayout.JAVA_LONG;
            case "float":
                return ValueLayout.JAVA_FLOAT;
            default:
                throw new IllegalArgumentException(type);
        }
    }

    private static MemoryLayout declared(String declaration) {
        String text = declaration.trim();
        return layout(text.substring(0, Math.max(text.lastIndexOf(' '), text.lastIndexOf('*')) + 1));
    }

    private MethodHandle function(String name) {
        Matcher prototype = Pattern.compile("^([a-z][^;{}#()]*?)\\b" + name + "\\(([^)]*)\\);", Pattern.MULTILINE | Pattern.DOTALL)
                .matcher(header.replaceAll("(?s)/\\*.*?\\*/", ""));
        if (!prototype.find()) {
            throw new IllegalArgumentException(name + " is not in the header");
        }
        List<MemoryLayout> parameters = new ArrayList<>();
        for (String parameter : prototype.group(2).split(",")) {
            if (!parameter.trim().equals("void")) {
                parameters.add(declared(parameter));
            }
        }
        String result = prototype.group(1).trim();
        MemoryLayout[] all = parameters.toArray(MemoryLayout[]::new);
        FunctionDescriptor descriptor = result.equals("void")
                ? FunctionDescriptor.ofVoid(all)
                : FunctionDescriptor.of(layout(result), all);
        return Linker.nativeLinker().downcallHandle(library.find(name).orElseThrow(), descriptor);
    }

    /** A struct of the header, as C lays it out. */
    private MemoryLayout struct(String name) {
        Matcher body = Pattern.compile("typedef struct " + name + " \\{(.*?)\\} " + name + ";", Pattern.DOTALL).matcher(header);
        if (!body.find()) {
            throw new IllegalArgumentException(name + " is not in the header");
        }
        List<MemoryLayout> fields = new ArrayList<>();
        long offset = 0;
        for (String field : body.group(1).replaceAll("(?s)/\\*.*?\\*/", "").split(";")) {
            if (field.isBlank()) {
                continue;
            }
            String text = field.trim();
            MemoryLayout layout = declared(text);
            long gap = -offset & (layout.byteAlignment() - 1);
            if (gap > 0) {
                fields.add(MemoryLayout.paddingLayout(gap));
            }
            fields.add(layout.withName(text.substring(text.lastIndexOf(text.contains("*") ? '*' : ' ') + 1)));
            offset += gap + layout.byteSize();
        }
        return MemoryLayout.structLayout(fields.toArray(MemoryLayout[]::new));
    }

    private int constant(String name) {
        Matcher value = Pattern.compile("#define " + name + " (\\w+)").matcher(header);
        if (!value.find()) {
            throw new IllegalArgumentException(name);
        }
        return Integer.decode(value.group(1).replaceFirst("^0x0*", "0x"));
    }

    private void check(Object status) throws Throwable {
        if ((int) status != constant("NYBL_OK")) {
            MemorySegment text = arena.allocate(500);
            long length = (long) function("nybl_last_error").invokeWithArguments(text, 500L);
            throw new AssertionError(length == 0 ? "a failure without words" : text.getString(0));
        }
    }

    private MemorySegment make(String function, Object... arguments) throws Throwable {
        MemorySegment out = arena.allocate(ValueLayout.ADDRESS);
        List<Object> all = new ArrayList<>(List.of(arguments));
        all.add(out);
        check(function(function).invokeWithArguments(all));
        return out.get(ValueLayout.ADDRESS, 0);
    }

    private String generate(String path, String prompt, int tokens) throws Throwable {
        int version = (int) function("nybl_abi_version").invokeWithArguments();
        if (version >>> 16 != constant("NYBL_ABI_MAJOR")) {
            throw new AssertionError("ABI " + version);
        }
        MemorySegment utf8 = arena.allocateFrom(prompt);
        MemorySegment runtime = make("nybl_runtime_create", MemorySegment.NULL);
        MemorySegment file = arena.allocateFrom(path);
        MemorySegment model = make("nybl_model_open", runtime, file, file.byteSize() - 1);
        MemorySegment session = make("nybl_session_create", model, MemorySegment.NULL);
        MemorySegment ids = arena.allocate(ValueLayout.JAVA_INT, 64);
        MemorySegment count = arena.allocate(ValueLayout.JAVA_LONG);
        int flags = constant("NYBL_TOKENIZE_ADD_SPECIAL");
        check(function("nybl_tokenize").invokeWithArguments(model, utf8, utf8.byteSize() - 1, flags, ids, 64L, count));
        check(function("nybl_session_append").invokeWithArguments(session, ids, count.get(ValueLayout.JAVA_LONG, 0)));

        MemoryLayout layout = struct("nybl_event");
        MemorySegment event = arena.allocate(layout);
        event.set(ValueLayout.JAVA_INT, 0, (int) layout.byteSize());
        long kind = layout.byteOffset(MemoryLayout.PathElement.groupElement("kind"));
        long text = layout.byteOffset(MemoryLayout.PathElement.groupElement("text"));
        long length = layout.byteOffset(MemoryLayout.PathElement.groupElement("text_len"));
        StringBuilder story = new StringBuilder(prompt);
        MethodHandle next = function("nybl_session_next");
        for (int i = 0; i < tokens; i++) {
            check(next.invokeWithArguments(session, event));
            MemorySegment bytes = event.get(ValueLayout.ADDRESS, text).reinterpret(event.get(ValueLayout.JAVA_LONG, length));
            story.append(new String(bytes.toArray(ValueLayout.JAVA_BYTE), StandardCharsets.UTF_8));
            if (event.get(ValueLayout.JAVA_INT, kind) != constant("NYBL_EVENT_TOKEN")) {
                break;
            }
        }
        function("nybl_session_destroy").invokeWithArguments(session);
        function("nybl_model_release").invokeWithArguments(model);
        function("nybl_runtime_destroy").invokeWithArguments(runtime);
        return story.toString();
    }

    public static void main(String[] arguments) throws Throwable {
        try (Arena arena = Arena.ofConfined()) {
            String header = Files.readString(Path.of(arguments[0]));
            SymbolLookup library = SymbolLookup.libraryLookup(Path.of(arguments[1]), arena);
            System.out.println(new Smoke(header, library, arena).generate(arguments[2], "Once upon a time", 60));
        }
    }
}
