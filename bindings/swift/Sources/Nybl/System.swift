#if canImport(Darwin)
import Foundation

/// Tells a model of the system's thermal state and low-power mode, now and whenever they change, until it is
/// released. It does not keep the model.
public final class SystemObserver {
    private var observers: [any NSObjectProtocol] = []

    public init(_ model: Model) {
        Self.report(to: model)
        let names: [Notification.Name] = [
            ProcessInfo.thermalStateDidChangeNotification, .NSProcessInfoPowerStateDidChange,
        ]
        for name in names {
            let observer = NotificationCenter.default.addObserver(forName: name, object: nil, queue: nil) {
                [weak model] _ in
                if let model { Self.report(to: model) }
            }
            observers.append(observer)
        }
    }

    deinit { observers.forEach(NotificationCenter.default.removeObserver) }

    private static func report(to model: Model) {
        let process = ProcessInfo.processInfo
        let state: Model.ThermalState =
            switch process.thermalState {
            case .nominal: .nominal
            case .fair: .fair
            case .serious: .serious
            case .critical: .critical
            @unknown default: .serious
            }
        // Both are values that the library knows, of a model that is there.
        try? model.reportHeat(state)
        try? model.setPowerMode(process.isLowPowerModeEnabled ? .low : .foreground)
    }
}
#endif
