/* bin/python and bin/vashista of an installed version: start Python with the bundle's own loader and libc.
 *
 * A program and no shell script, so that the unit of the server need not be able to run a shell. It is static, so that it
 * runs on any libc. `versions/NAME/bin/python A B` becomes
 *
 *     LOADER --argv0 versions/NAME/bin/python --library-path LIBRARIES PYTHON A B
 *
 * with all three from versions/NAME/runtime, and `bin/vashista A B` the same with `-P versions/NAME/bin/start.py` before A.
 * The folder is that of the file itself, whatever links led to it: a server goes on with its version after `current`
 * points to another. Python takes argv0 for its place, and finds pyvenv.cfg beside it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ROOM 4096
#define LIBRARIES "/runtime/usr/lib/x86_64-linux-gnu"

static char *join(const char *folder, const char *rest) {
    char *path = malloc(strlen(folder) + strlen(rest) + 1);
    if (path == NULL) _exit(127);
    return strcat(strcpy(path, folder), rest);
}

int main(int argc, char **argv) {
    char self[ROOM];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0 || length == sizeof self - 1) {
        perror("vashista: /proc/self/exe");
        return 127;
    }
    self[length] = 0;
    char *name = strrchr(self, '/');
    int is_vashista = strcmp(name + 1, "vashista") == 0;
    *name = 0;
    char *start = join(self, "/start.py"), *python = join(self, "/python");
    char *bin = strrchr(self, '/');
    if (bin == NULL) return 127;
    *bin = 0;
    char *loader = join(self, LIBRARIES "/ld-linux-x86-64.so.2");

    char **args = calloc(argc + 9, sizeof *args);
    if (args == NULL) return 127;
    int n = 0;
    args[n++] = loader;
    args[n++] = "--argv0";
    args[n++] = python;
    args[n++] = "--library-path";
    args[n++] = join(self, LIBRARIES);
    args[n++] = join(self, "/runtime/usr/bin/python3.11");
    if (is_vashista) {
        args[n++] = "-P";
        args[n++] = start;
        setenv("PYTHONSAFEPATH", "1", 1); /* for the engine, which it starts */
    }
    for (int i = 1; i < argc; i++) args[n++] = argv[i];
    setenv("PYTHONNOUSERSITE", "1", 1);
    unsetenv("PYTHONHOME");
    unsetenv("PYTHONPATH");
    execv(loader, args);
    perror(loader);
    return 127;
}
