/* Prints what getaddrinfo says of a name: addresses, or the error's name. Built against musl. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *one;
    char text[INET6_ADDRSTRLEN];
    if (argc < 2)
        return 2;
    int error = getaddrinfo(argv[1], NULL, &hints, &found);
    if (error) {
        printf("error: %s\n", gai_strerror(error));
        return 1;
    }
    for (one = found; one; one = one->ai_next) {
        if (one->ai_family == AF_INET)
            inet_ntop(AF_INET, &((struct sockaddr_in *)one->ai_addr)->sin_addr, text, sizeof text);
        else
            inet_ntop(AF_INET6, &((struct sockaddr_in6 *)one->ai_addr)->sin6_addr, text, sizeof text);
        printf("%s\n", text);
    }
    return 0;
}
