import java.net.InetAddress;
import java.net.UnknownHostException;

/** Prints what Java says of a name: addresses, or the error. */
public class Lookup {
    public static void main(String[] words) {
        try {
            for (InetAddress address : InetAddress.getAllByName(words[0])) {
                System.out.println(address.getHostAddress());
            }
        } catch (UnknownHostException error) {
            System.out.println("error: " + error.getMessage());
            System.exit(1);
        }
    }
}
